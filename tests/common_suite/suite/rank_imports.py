"""What the ranks of the multi-process tests need. The server that they are forked from imports it once; below
transformers 5.23, where the mixins start their own ranks, `spawn` has each of them import it."""

from types import SimpleNamespace

import fsdp_batches
import llava_vr_remote
import torch.multiprocessing


llava_vr_remote.register()
fsdp_batches.use()


def rank_main(rank, function, *args):
    function(rank, *args)


def spawn(function, args=(), **options):
    return torch.multiprocessing.spawn(rank_main, args=(function, *args), **options)


def use(mixin):
    """Ranks that the mixin starts itself import this module first."""
    if hasattr(mixin, "mp"):
        mixin.mp = SimpleNamespace(spawn=spawn)
