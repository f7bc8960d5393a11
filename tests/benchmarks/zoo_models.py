"""Models of timm and transformers, made small: few blocks a stage, random weights, small inputs."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["LIBRARIES", "MODELS", "Subject"]

LIBRARIES = ("timm", "transformers")

MOST_BLOCKS = 2
"""Blocks of one shape in a row that are kept."""


@dataclass(frozen=True)
class Subject:
    """A model and what it is run on.

    Attributes:
        build: makes it, in eval mode, always the same.
        inputs: (how many, seed) -> inputs.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int, int], list[tuple[Tensor, ...]]]


# ---------------------------------------------------------------------------------------------
# Inputs
# ---------------------------------------------------------------------------------------------


def images(size: int) -> Callable[[int, int], list[tuple[Tensor, ...]]]:
    """Random images ``(1, 3, size, size)``."""

    def make(count: int, seed: int) -> list[tuple[Tensor, ...]]:
        generator = torch.Generator().manual_seed(seed)
        return [(torch.randn(1, 3, size, size, generator=generator),) for _ in range(count)]

    return make


def tokens(
    length: int, vocabulary: int = 100, *, mask: bool = False
) -> Callable[[int, int], list[tuple[Tensor, ...]]]:
    """Random tokens ``(1, length)`` and, if asked for, a mask that leaves out the last ones."""

    def make(count: int, seed: int) -> list[tuple[Tensor, ...]]:
        generator = torch.Generator().manual_seed(seed)
        made: list[tuple[Tensor, ...]] = []
        for _ in range(count):
            ids = torch.randint(2, vocabulary, (1, length), generator=generator)
            kept = int(torch.randint(length // 2, length + 1, (), generator=generator))
            seen = (torch.arange(length) < kept).long()[None]
            made.append((ids, seen) if mask else (ids,))
        return made

    return make


def features(*shape: int) -> Callable[[int, int], list[tuple[Tensor, ...]]]:
    """Random features ``(1, *shape)``."""

    def make(count: int, seed: int) -> list[tuple[Tensor, ...]]:
        generator = torch.Generator().manual_seed(seed)
        return [(torch.randn(1, *shape, generator=generator),) for _ in range(count)]

    return make


# ---------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------


def prepared(model: nn.Module, example: tuple[Tensor, ...]) -> nn.Module:
    """Give a model weights and statistics as if it had been trained.

    Weights that start out as zeros or as next to nothing (the last norm of a residual block, layer
    scales, heads) would hide what is behind them.
    """
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.numel() > 1 and float(parameter.detach().std()) < 1e-4:
            if parameter.dim() > 1:
                parameter.data = 0.02 * torch.randn(parameter.shape, generator=generator)
            elif float(parameter.detach().abs().max()) < 1e-3:  # zeros: biases and layer scales
                parameter.data = 0.1 * torch.rand(parameter.shape, generator=generator)
            else:  # ones: the factors of norms
                parameter.data *= 0.5 + torch.rand(parameter.shape, generator=generator)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 0.5
        norm.train()
    if norms:
        for _ in range(4):
            model(*(torch.cat([value, value.roll(3, -1)]) for value in example))
    return model.eval()


def thinned(model: nn.Module) -> nn.Module:
    """Leave out blocks that repeat the one before them, but for the first two of a row."""
    for module in list(model.modules()):
        if type(module) is not nn.Sequential or len(module) <= MOST_BLOCKS:
            continue
        kept: list[nn.Module] = []
        row, last = 0, None
        for block in module:
            looks = [(name, value.shape) for name, value in block.state_dict().items()]
            row = row + 1 if looks and looks == last else 1
            last = looks
            if row <= MOST_BLOCKS:
                kept.append(block)
        if len(kept) < len(module):
            names = list(module._modules)[: len(kept)]
            module._modules.clear()
            for name, block in zip(names, kept, strict=True):
                module.add_module(name, block)
    return model


def timm_model(name: str, size: int, **options: Any) -> Subject:
    """A model of timm, thinned if it still runs then."""
    inputs = images(size)

    def build() -> nn.Module:
        create = importlib.import_module("timm").create_model
        (example,) = inputs(1, 0)

        def made() -> nn.Module:
            torch.manual_seed(0)
            try:
                return create(name, img_size=size, **options).eval()
            except TypeError:
                return create(name, **options).eval()

        model = thinned(made())
        try:
            model(*example)
        except (RuntimeError, IndexError, ValueError, AssertionError):
            model = made()
        return prepared(model, example)

    return Subject(build, inputs)


class FirstOutput(nn.Module):
    """A model of transformers whose inputs are tensors in order, and whose output is one."""

    def __init__(self, model: nn.Module, names: tuple[str, ...], options: dict[str, Any]) -> None:
        super().__init__()
        self.model, self.names, self.options = model, names, options

    def forward(self, *inputs: Tensor) -> Tensor:
        output: Tensor = self.model(**dict(zip(self.names, inputs, strict=True)), **self.options)[0]
        return output


@dataclass(frozen=True)
class Hugging:
    """A model of transformers.

    Attributes:
        model: its class.
        config: class of its configuration.
        inputs: see ``Subject``.
        names: of the inputs.
        settings: of the configuration.
        options: arguments of every call.
        backbone: class of the configuration of its backbone, if it has one.
    """

    model: str
    config: str
    inputs: Callable[[int, int], list[tuple[Tensor, ...]]]
    names: tuple[str, ...]
    settings: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    backbone: str = "ResNetConfig"

    def subject(self) -> Subject:
        """What is measured."""

        def build() -> nn.Module:
            library = importlib.import_module("transformers")
            torch.manual_seed(0)
            settings = {
                key: getattr(library, self.backbone)(**value) if key == "backbone_config" else value
                for key, value in self.settings.items()
            }
            config = getattr(library, self.config)(**settings)
            model = getattr(library, self.model)(config).eval()
            wrapped = FirstOutput(model, self.names, self.options)
            return prepared(wrapped, self.inputs(1, 0)[0])

        return Subject(build, self.inputs)


_BERT = {
    "vocab_size": 100,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
}
_IMAGE = {"image_size": 64, "patch_size": 16}
_LAYERS = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}
_VISION = {**_IMAGE, **_LAYERS}
_DECODER = {**_LAYERS, "vocab_size": 100, "num_key_value_heads": 2, "max_position_embeddings": 64}
_NO_TOKENS = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
}
_WAVES = {
    **_BERT,
    "conv_dim": [16, 16, 16],
    "conv_stride": [5, 4, 4],
    "conv_kernel": [10, 5, 3],
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
_SPARSE = {**_NO_TOKENS, "attention_type": "block_sparse", "block_size": 2, "num_random_blocks": 1}
_GEMMA3 = {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}

TRANSFORMERS: dict[str, Hugging] = {
    "BERT": Hugging("BertModel", "BertConfig", tokens(16), ("input_ids",), _BERT),
    "BERT, masked": Hugging(
        "BertModel", "BertConfig", tokens(16, mask=True), ("input_ids", "attention_mask"), _BERT
    ),
    "DistilBERT": Hugging(
        "DistilBertModel",
        "DistilBertConfig",
        tokens(16),
        ("input_ids",),
        {"vocab_size": 100, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128},
    ),
    "T5 encoder": Hugging(
        "T5EncoderModel",
        "T5Config",
        tokens(16),
        ("input_ids",),
        {
            "vocab_size": 100,
            "d_model": 64,
            "d_kv": 16,
            "d_ff": 128,
            "num_layers": 2,
            "num_heads": 4,
        },
    ),
    "GPT2": Hugging(
        "GPT2LMHeadModel",
        "GPT2Config",
        tokens(16),
        ("input_ids",),
        {"vocab_size": 100, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4},
        {"use_cache": False},
    ),
    "Llama": Hugging(
        "LlamaForCausalLM",
        "LlamaConfig",
        tokens(16),
        ("input_ids",),
        {
            "vocab_size": 100,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 128,
        },
        {"use_cache": False},
    ),
    "CLIP vision": Hugging(
        "CLIPVisionModel",
        "CLIPVisionConfig",
        images(64),
        ("pixel_values",),
        {
            **_IMAGE,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 128,
        },
    ),
    "CLIP text": Hugging(
        "CLIPTextModel",
        "CLIPTextConfig",
        tokens(16),
        ("input_ids",),
        {**_BERT, "eos_token_id": 99, "pad_token_id": 1, "bos_token_id": 0},
    ),
    "DETR": Hugging(
        "DetrForObjectDetection",
        "DetrConfig",
        images(96),
        ("pixel_values",),
        {
            "use_timm_backbone": False,
            "use_pretrained_backbone": False,
            "backbone": None,
            "backbone_config": {
                "embedding_size": 16,
                "hidden_sizes": [16, 32, 48, 64],
                "depths": [1, 1, 1, 1],
                "layer_type": "basic",
                "out_features": ["stage4"],
            },
            "d_model": 64,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_ffn_dim": 128,
            "decoder_ffn_dim": 128,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "num_queries": 10,
        },
    ),
    "ConvNext": Hugging(
        "ConvNextForImageClassification",
        "ConvNextConfig",
        images(64),
        ("pixel_values",),
        {"hidden_sizes": [32, 64, 96, 128], "depths": [1, 1, 2, 1], "num_labels": 10},
    ),
    **{
        name: Hugging(f"{kind}Model", f"{kind}Config", images(64), ("pixel_values",), settings)
        for name, kind, settings in (
            ("ViT", "ViT", _VISION),
            ("DeiT", "DeiT", _VISION),
            ("BEiT", "Beit", {**_VISION, "use_relative_position_bias": True}),
            ("DINOv2", "Dinov2", {**_VISION, "mlp_ratio": 2}),
            ("YOLOS", "Yolos", {**_VISION, "image_size": [64, 64], "num_detection_tokens": 5}),
            ("SigLIP vision", "SiglipVision", _VISION),
            (
                "Swin",
                "Swin",
                {
                    "image_size": 64,
                    "embed_dim": 16,
                    "depths": [1, 2],
                    "num_heads": [2, 4],
                    "window_size": 4,
                },
            ),
            (
                "PVT v2",
                "PvtV2",
                {
                    "hidden_sizes": [16, 32, 64, 64],
                    "depths": [1, 1, 1, 1],
                    "num_attention_heads": [1, 2, 4, 4],
                },
            ),
        )
    },
    **{
        name: Hugging(kind, config, tokens(16), ("input_ids",), {**_BERT, **settings})
        for name, kind, config, settings in (
            ("BigBird", "BigBirdModel", "BigBirdConfig", _SPARSE),
            ("ConvBERT", "ConvBertModel", "ConvBertConfig", {"embedding_size": 64}),
            ("ESM", "EsmModel", "EsmConfig", {"mask_token_id": 3, **_NO_TOKENS}),
            ("ALBERT", "AlbertModel", "AlbertConfig", {"embedding_size": 32}),
            ("ELECTRA", "ElectraModel", "ElectraConfig", {"embedding_size": 32}),
            ("RoBERTa", "RobertaModel", "RobertaConfig", {}),
            ("SqueezeBERT", "SqueezeBertModel", "SqueezeBertConfig", {"embedding_size": 64}),
            ("MPNet", "MPNetModel", "MPNetConfig", {}),
            ("ModernBERT", "ModernBertModel", "ModernBertConfig", _NO_TOKENS),
            ("DeBERTa", "DebertaModel", "DebertaConfig", {}),
        )
    },
    **{
        name: Hugging(
            f"{kind}ForCausalLM",
            "Gemma3TextConfig" if kind == "Gemma3" else f"{kind}Config",
            tokens(16),
            ("input_ids",),
            {**_DECODER, **settings},
            {"use_cache": False},
        )
        for name, kind, settings in (
            ("Bloom", "Bloom", {"n_layer": 2, "n_head": 4}),
            ("DiffLlama", "DiffLlama", {}),
            ("Falcon", "Falcon", {"num_key_value_heads": 4}),
            ("Gemma 3", "Gemma3", _GEMMA3),
            ("GLM 4", "Glm4", {"head_dim": 16, **_NO_TOKENS}),
            ("LFM2", "Lfm2", {"layer_types": ["conv", "full_attention"]}),
            ("Mamba", "Mamba", {"state_size": 8}),
            ("MPT", "Mpt", {"n_layers": 2, "n_heads": 4, "d_model": 64, "max_seq_len": 64}),
            ("Phi 3", "Phi3", _NO_TOKENS),
            ("Qwen2", "Qwen2", {}),
            ("Qwen3", "Qwen3", {"head_dim": 16}),
            ("Mistral", "Mistral", {}),
            ("Gemma", "Gemma", {"head_dim": 16}),
            ("Phi", "Phi", {"num_key_value_heads": 4}),
            ("OPT", "OPT", {"ffn_dim": 128, "word_embed_proj_dim": 64}),
            ("GPT-NeoX", "GPTNeoX", {}),
        )
    },
    "SegFormer": Hugging(
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        images(64),
        ("pixel_values",),
        {
            "hidden_sizes": [16, 32, 48, 64],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 2, 4, 4],
            "decoder_hidden_size": 64,
            "num_labels": 10,
        },
    ),
    "MobileViT, segmenting": Hugging(
        "MobileViTForSemanticSegmentation",
        "MobileViTConfig",
        images(64),
        ("pixel_values",),
        {
            "image_size": 64,
            "hidden_sizes": [32, 48, 64],
            "neck_hidden_sizes": [8, 16, 16, 24, 32, 48, 64],
            "aspp_out_channels": 32,
            "atrous_rates": [2, 4, 6],
            "num_labels": 10,
        },
    ),
    "UperNet": Hugging(
        "UperNetForSemanticSegmentation",
        "UperNetConfig",
        images(64),
        ("pixel_values",),
        {
            "backbone": None,
            "backbone_config": {
                "embedding_size": 16,
                "hidden_sizes": [16, 32, 48, 64],
                "depths": [1, 1, 1, 1],
                "layer_type": "basic",
                "out_features": ["stage1", "stage2", "stage3", "stage4"],
            },
            "hidden_size": 32,
            "use_auxiliary_head": False,
            "num_labels": 10,
        },
    ),
    "Depth Anything": Hugging(
        "DepthAnythingForDepthEstimation",
        "DepthAnythingConfig",
        images(56),
        ("pixel_values",),
        {
            "backbone_config": {
                "image_size": 56,
                "patch_size": 14,
                "hidden_size": 32,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "mlp_ratio": 2,
                "out_indices": [1, 2, 3, 4],
                "reshape_hidden_states": False,
            },
            "reassemble_hidden_size": 32,
            "neck_hidden_sizes": [8, 16, 32, 32],
            "fusion_hidden_size": 16,
            "head_hidden_size": 8,
            "patch_size": 14,
        },
        backbone="Dinov2Config",
    ),
    "Whisper encoder": Hugging(
        "WhisperForAudioClassification",
        "WhisperConfig",
        features(80, 64),
        ("input_features",),
        {
            "d_model": 64,
            "encoder_layers": 2,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 128,
            "max_source_positions": 32,
        },
    ),
    "Wav2Vec2": Hugging(
        "Wav2Vec2Model",
        "Wav2Vec2Config",
        features(2000),
        ("input_values",),
        _WAVES,
    ),
    "SEW-D": Hugging(
        "SEWDModel",
        "SEWDConfig",
        features(2000),
        ("input_values",),
        {**_WAVES, "squeeze_factor": 2, "position_buckets": 8},
    ),
    "Wav2Vec2 Conformer": Hugging(
        "Wav2Vec2ConformerModel",
        "Wav2Vec2ConformerConfig",
        features(2000),
        ("input_values",),
        {**_WAVES, "conv_depthwise_kernel_size": 7},
    ),
    "HiFi-GAN": Hugging(
        "SpeechT5HifiGan",
        "SpeechT5HifiGanConfig",
        features(24, 16),
        ("spectrogram",),
        {
            "model_in_dim": 16,
            "upsample_initial_channel": 32,
            "upsample_rates": [4, 2],
            "upsample_kernel_sizes": [8, 4],
            "resblock_kernel_sizes": [3, 7],
            "resblock_dilation_sizes": [[1, 3], [1, 3]],
        },
    ),
    "SAM, images": Hugging(
        "SamVisionModel",
        "SamVisionConfig",
        images(64),
        ("pixel_values",),
        {
            **_VISION,
            "output_channels": 16,
            "window_size": 2,
            "global_attn_indexes": [1],
            "mlp_dim": 128,
        },
    ),
    "VideoMAE": Hugging(
        "VideoMAEModel",
        "VideoMAEConfig",
        features(4, 3, 64, 64),
        ("pixel_values",),
        {**_VISION, "num_frames": 4, "tubelet_size": 2},
    ),
    "PatchTST": Hugging(
        "PatchTSTModel",
        "PatchTSTConfig",
        features(32, 3),
        ("past_values",),
        {
            "num_input_channels": 3,
            "context_length": 32,
            "patch_length": 4,
            "patch_stride": 4,
            "d_model": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 64,
        },
    ),
    "Audio Spectrogram Transformer": Hugging(
        "ASTModel",
        "ASTConfig",
        features(64, 32),
        ("input_values",),
        {**_VISION, "num_mel_bins": 32, "max_length": 64},
    ),
    "BART": Hugging(
        "BartModel",
        "BartConfig",
        tokens(16),
        ("input_ids",),
        {
            "vocab_size": 100,
            "d_model": 64,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 128,
            "decoder_ffn_dim": 128,
            "max_position_embeddings": 64,
            "pad_token_id": 1,
            "bos_token_id": 0,
            "eos_token_id": 2,
            "decoder_start_token_id": 2,
        },
        {"use_cache": False},
    ),
}

_TIMM = {
    64: """
        convmixer_768_32 cspnext_tiny dpn68 efficientnet_lite0 fasternet_t0 fbnetc_100 gernet_s
        hardcorenas_a hgnetv2_b0 lcnet_050 mobileone_s0 nf_regnet_b0 repghostnet_050
        res2net50_14w_8s resnetv2_18 starnet_s050 test_nfnet tf_efficientnet_b0
        tf_mobilenetv3_small_minimal_100
    """,
    96: """
        convnext_atto convnext_zepto_rms convnextv2_atto cs3darknet_focus_s dla34 eca_resnext26ts
        edgenext_xx_small efficientvit_b0 ese_vovnet19b_slim_dw fastvit_t8 gcresnext26ts
        ghostnet_100 ghostnetv2_100 hrnet_w18_small iformer_t inception_next_atto legacy_xception
        lowformer_b0 mambaout_femto mixnet_s mobilenetv4_conv_small mobilevit_xxs mobilevitv2_050
        poolformer_s12 rdnet_tiny regnety_002 regnetz_005 repvgg_a0 repvit_m0_9 resnest14d
        resnetblur18 rexnet_100 selecsls42 skresnet18
    """,
    128: """
        focalnet_tiny_srf lambda_resnet26t mixer_s32_224 mobilenetv4_hybrid_medium
        sequencer2d_s shvit_s1 swiftformer_xs
    """,
    224: """
        cait_xxs24_224 coat_lite_tiny convit_tiny davit_tiny deit_tiny_distilled_patch16_224
        efficientformer_l1 efficientformerv2_s0 efficientvim_m1 efficientvit_m0
        eva02_tiny_patch14_224 gcvit_xxtiny gmlp_ti16_224 hiera_tiny_224 hieradet_small levit_128s
        mvitv2_tiny nest_tiny nextvit_small pit_ti_224 pvt_v2_b0 resmlp_12_224
        swin_tiny_patch4_window7_224 tiny_vit_5m_224 tnt_s_patch16_224 twins_svt_small
        visformer_tiny vitamin_small_224 vit_relpos_small_patch16_224 vit_tiny_patch16_224
        volo_d1_224 xcit_nano_12_p16_224
    """,
    240: "crossvit_tiny_240",
    256: """
        bat_resnext26ts botnet26t_256 coatnet_nano_rw_224 halonet26t maxvit_pico_rw_256
        swinv2_tiny_window8_256
    """,
}
"""Height and width of images -> names."""

MODELS: dict[str, Subject] = {
    **{name: timm_model(name, size) for size, names in _TIMM.items() for name in names.split()},
    **{name: hugging.subject() for name, hugging in TRANSFORMERS.items()},
}
