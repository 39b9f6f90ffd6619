"""Tiny random networks that steer, of diffusers' own classes, each fitting a tiny family."""

from __future__ import annotations

from typing import Any


def controlnet(**changes: Any) -> Any:
    """For the U-Net of `tiny_families.sdxl`."""
    from diffusers import ControlNetModel

    size = {"cross_attention_dim": 40, "attention_head_dim": 2, "norm_num_groups": 4, "layers_per_block": 1,
            "block_out_channels": (8, 16), "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "conditioning_embedding_out_channels": (4, 4, 4), "use_linear_projection": True,
            "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 68}  # fmt: skip
    return ControlNetModel(**(size | changes))


def union(**changes: Any) -> Any:
    """For the U-Net of `tiny_families.sdxl`, of the published one's eight kinds."""
    from diffusers import ControlNetUnionModel

    size = {"cross_attention_dim": 40, "attention_head_dim": 2, "norm_num_groups": 4, "layers_per_block": 1,
            "block_out_channels": (8, 16), "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "conditioning_embedding_out_channels": (4, 4, 4), "use_linear_projection": True,
            "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 68, "num_control_type": 8, "num_trans_channel": 8, "num_trans_head": 2,
            "num_proj_channel": 8}  # fmt: skip
    return ControlNetUnionModel(**(size | changes))


def adapter() -> Any:
    """For the U-Net of `tiny_controls.STAGES`, whose pixels are 8 to one of the first features."""
    from diffusers import T2IAdapter

    return T2IAdapter(3, [8, 16, 16, 16], 2, 8, "full_adapter_xl")


def sd3_controlnet(**changes: Any) -> Any:
    """For `tiny_families.sd3`, of one block for its two."""
    from diffusers import SD3ControlNetModel

    size = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 1, "attention_head_dim": 8, "out_channels": 4,
            "num_attention_heads": 4, "caption_projection_dim": 32, "joint_attention_dim": 32, "pooled_projection_dim": 22,
            "pos_embed_max_size": 96}  # fmt: skip
    return SD3ControlNetModel(**(size | changes))


def flux_controlnet(**changes: Any) -> Any:
    """For `tiny_families.flux`."""
    from diffusers import FluxControlNetModel

    size = {"in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
            "joint_attention_dim": 32, "pooled_projection_dim": 16, "axes_dims_rope": (4, 4, 8),
            "guidance_embeds": True}  # fmt: skip
    return FluxControlNetModel(**(size | changes))


def sana_controlnet(**changes: Any) -> Any:
    """For `tiny_families.sana`, of one block."""
    from diffusers import SanaControlNetModel

    size = {"patch_size": 1, "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_attention_heads": 2, "sample_size": 8,
            "attention_head_dim": 4, "num_cross_attention_heads": 2, "cross_attention_head_dim": 4, "cross_attention_dim": 8,
            "caption_channels": 8}  # fmt: skip
    return SanaControlNetModel(**(size | changes))
