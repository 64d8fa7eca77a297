"""A stand-in for lmms-eval 0.7: the interface of its models and, as `python -m lmms_eval`, tasks that generate."""
