"""What the ranks of the multi-process tests need: imported once, by the server that they are forked from."""

import fsdp_batches
import llava_vr_remote


llava_vr_remote.register()
fsdp_batches.use()
