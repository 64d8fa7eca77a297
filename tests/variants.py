"""Configurations that tests hold for, each as what it changes in the tiny one."""

VARIANTS = {
    "spatial_unpad": {},
    "slices": {
        "image_merge_type": "slices",
        "image_separator_ids": [60, 70],
        "image_grid_pinpoints": [[32, 32], [32, 96], [64, 32], [64, 64]],
        "projector_type": "c_abstractor",
        "projector_downsample": 3,
        "projector_kwargs": {"depth": 1},
    },
}
