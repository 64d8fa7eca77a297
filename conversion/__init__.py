"""From checkpoints of other projects to a LLaVA-VR folder; `convert_weights.py` is the entry.

Read in this order: `readers` (one tensor at a time from disk), `mapping` (names), `adapters` (LoRA), `sources` (what a
folder is and the configuration it means), `tower` (without layers that nothing reads), `plan` (each tensor's way),
`writer` (shards), `companions` (all other files), `output` (how they take OUTPUT's place, all or nothing), `verify`
(the result beside its source).
"""
