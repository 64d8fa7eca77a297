"""Public benchmarks: adapters of harnesses, tasks on the lab's pictures, and the table of what they measured."""
