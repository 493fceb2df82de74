"""The architectures of the zoo: classes of transformers, and what their tiny configs need to be told.

A row is a class. Sizes come from `building.SIZES`; a row holds only what its family needs beside them.
`takes` says what the model is run on, see `building.inputs`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """One row. `settings` are the config's, those of configs inside it as dicts."""

    name: str
    group: str
    takes: str
    settings: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


Rows = dict[str, dict[str, Any]]

DENSE: Rows = {
    "ApertusForCausalLM": {},
    "BitNetForCausalLM": {},
    "BloomForCausalLM": {},
    "Cohere2ForCausalLM": {},
    "DiffLlamaForCausalLM": {},
    "DogeForCausalLM": {},
    "Ernie4_5ForCausalLM": {},
    "Exaone4ForCausalLM": {},
    "FalconForCausalLM": {},
    "Gemma2ForCausalLM": {"query_pre_attn_scalar": 16},
    "Gemma3ForCausalLM": {"query_pre_attn_scalar": 16},
    "Gemma4ForCausalLM": {
        "global_head_dim": 16, "vocab_size_per_layer_input": 160,
        "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0,
    },
    "Glm4ForCausalLM": {},
    "GPT2LMHeadModel": {},
    "GPTBigCodeForCausalLM": {},
    "GPTJForCausalLM": {},
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 2]]},
    "GPTNeoXForCausalLM": {},
    "GraniteForCausalLM": {},
    "HeliumForCausalLM": {},
    "LlamaForCausalLM": {},
    "MiniCPM3ForCausalLM": {},
    "MistralForCausalLM": {},
    "ModernBertDecoderForCausalLM": {},
    "MptForCausalLM": {},
    "NemotronForCausalLM": {},
    "Olmo2ForCausalLM": {},
    "Olmo3ForCausalLM": {},
    "OPTForCausalLM": {},
    "PersimmonForCausalLM": {},
    "Phi3ForCausalLM": {},
    "PhiForCausalLM": {},
    "Qwen2ForCausalLM": {},
    "Qwen3ForCausalLM": {"tie_word_embeddings": True},
    "SmolLM3ForCausalLM": {},
    "StableLmForCausalLM": {},
    "Starcoder2ForCausalLM": {},
    "XGLMForCausalLM": {},
}  # fmt: skip

HYBRID: Rows = {
    "BambaForCausalLM": {"attn_layer_indices": [2]},
    "FalconH1ForCausalLM": {},
    "FalconMambaForCausalLM": {},
    "GraniteMoeHybridForCausalLM": {"layer_types": ["mamba", "mamba", "attention", "mamba"]},
    "JambaForCausalLM": {
        "attn_layer_period": 4,
        "attn_layer_offset": 2,
        "use_mamba_kernels": False,
    },
    "KimiLinearForCausalLM": {
        "num_experts_per_token": 2,
        "linear_head_dim": 16,
        "linear_num_heads": 4,
        "head_dim": 8,
    },
    "Lfm2ForCausalLM": {},
    "Mamba2ForCausalLM": {"num_heads": 8, "n_groups": 1, "chunk_size": 16},
    "MambaForCausalLM": {},
    "MiniMaxForCausalLM": {},
    "NemotronHForCausalLM": {
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 1,
        "ssm_state_size": 16,
        "expand": 1,
        "chunk_size": 16,
        "moe_shared_expert_intermediate_size": 32,
    },
    "Qwen3_5ForCausalLM": {},
    "Qwen3NextForCausalLM": {},
    "RecurrentGemmaForCausalLM": {},
    "RwkvForCausalLM": {"attention_hidden_size": 64},
    "xLSTMForCausalLM": {},
}

MIXTURES: Rows = {
    "DeepseekV2ForCausalLM": {},
    "DeepseekV3ForCausalLM": {"first_k_dense_replace": 1, "head_dim": 8},
    "Ernie4_5_MoeForCausalLM": {},
    "FlexOlmoForCausalLM": {},
    "Glm4MoeForCausalLM": {"first_k_dense_replace": 0},
    "GptOssForCausalLM": {},
    "GraniteMoeForCausalLM": {},
    "JetMoeForCausalLM": {},
    "Llama4ForCausalLM": {},
    "MixtralForCausalLM": {},
    "OlmoeForCausalLM": {},
    "PhimoeForCausalLM": {},
    "Qwen2MoeForCausalLM": {},
    "Qwen3MoeForCausalLM": {},
}

ENCODER_DECODER: Rows = {
    "BartForConditionalGeneration": {},
    "BigBirdPegasusForConditionalGeneration": {"attention_type": "original_full"},
    "BlenderbotForConditionalGeneration": {},
    "LEDForConditionalGeneration": {
        "max_encoder_position_embeddings": 64,
        "max_decoder_position_embeddings": 64,
    },
    "LongT5ForConditionalGeneration": {},
    "M2M100ForConditionalGeneration": {},
    "MarianMTModel": {},
    "MBartForConditionalGeneration": {},
    "PegasusForConditionalGeneration": {},
    "ProphetNetForConditionalGeneration": {},
    "SwitchTransformersForConditionalGeneration": {},
    "T5ForConditionalGeneration": {},
    "T5GemmaForConditionalGeneration": {},
    "UMT5ForConditionalGeneration": {},
}

ENCODERS: Rows = {
    "AlbertForMaskedLM": {},
    "BertForMaskedLM": {},
    "BertForSequenceClassification": {"num_labels": 24},
    "BertModel": {},
    "ConvBertForMaskedLM": {},
    "DebertaV2ForSequenceClassification": {},
    "DistilBertForSequenceClassification": {},
    "ElectraForPreTraining": {},
    "EsmForMaskedLM": {},
    "EuroBertForMaskedLM": {},
    "LlamaForSequenceClassification": {},
    "ModernBertForMaskedLM": {},
    "MPNetForMaskedLM": {},
    "NomicBertForMaskedLM": {},
    "Qwen2ForTokenClassification": {},
    "RobertaForMaskedLM": {},
    "XLMRobertaForTokenClassification": {},
    "XLNetLMHeadModel": {"d_inner": 96},
}

DEPTHS = {"depths": [1, 1, 2, 1]}
STAGES = DEPTHS | {"hidden_sizes": [16, 32, 48, 64], "image_size": 64}
SMALL = DEPTHS | {"embedding_size": 16, "hidden_sizes": [16, 16, 32, 32]}
WINDOWS = DEPTHS | {"embed_dim": 16, "num_heads": [1, 2, 2, 4], "window_size": 2, "patch_size": 2}
VISION: Rows = {
    "BeitForImageClassification": {},
    "CLIPVisionModel": {},
    "ConvNextForImageClassification": STAGES,
    "ConvNextV2ForImageClassification": STAGES,
    "DeiTForImageClassification": {},
    "Dinov2ForImageClassification": {},
    "DINOv3ViTModel": {},
    "DPTForDepthEstimation": {
        "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [16, 16, 16, 16],
        "fusion_hidden_size": 16,
    },
    "MobileNetV2ForImageClassification": {"depth_multiplier": 0.1, "finegrained_output": True},
    "PixtralVisionModel": {},
    "RegNetForImageClassification": SMALL | {"groups_width": 8},
    "ResNetForImageClassification": SMALL,
    "SegformerForSemanticSegmentation": {
        "hidden_sizes": [16, 16, 32, 32], "num_attention_heads": [1, 1, 2, 2],
        "depths": [1, 1, 1, 1], "decoder_hidden_size": 16,
    },
    "SiglipVisionModel": {},
    "SwinForImageClassification": WINDOWS,
    "Swinv2ForImageClassification": WINDOWS | {"num_labels": 24},
    "VideoMAEForVideoClassification": {"num_frames": 4, "tubelet_size": 2},
    "ViTForImageClassification": {},
    "YolosForObjectDetection": {"image_size": [32, 32], "num_detection_tokens": 5},
}  # fmt: skip

SOUND = {"conv_kernel": (8, 8)}
AUDIO: Rows = {
    "ASTForAudioClassification": {"max_length": 64},
    "EncodecModel": {
        "hidden_size": 16, "num_filters": 4, "codebook_dim": 16, "codebook_size": 32,
        "upsampling_ratios": [4, 2],
    },
    "HubertForCTC": SOUND,
    "ParakeetForCTC": {},
    "SpeechT5ForSpeechToText": SOUND,
    "Wav2Vec2BertForCTC": {},
    "Wav2Vec2ForCTC": SOUND,
    "WavLMForCTC": SOUND,
    "WhisperForConditionalGeneration": {},
}  # fmt: skip

ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
MROPE = {"text_config": {"rope_parameters": ROPE}}
MULTIMODAL: Rows = {
    "AyaVisionForConditionalGeneration": {},
    "Blip2ForConditionalGeneration": {"image_token_index": 150},
    "BlipForConditionalGeneration": {},
    "CLIPModel": {},
    "Gemma3ForConditionalGeneration": {},
    "GotOcr2ForConditionalGeneration": {},
    "Idefics3ForConditionalGeneration": {},
    "InternVLForConditionalGeneration": {},
    "LlavaForConditionalGeneration": {},
    "LlavaNextForConditionalGeneration": {},
    "Mistral3ForConditionalGeneration": {},
    "MllamaForConditionalGeneration": {},
    "PaliGemmaForConditionalGeneration": {},
    "Qwen2_5_VLForConditionalGeneration": MROPE,
    "Qwen2AudioForConditionalGeneration": {},
    "Qwen2VLForConditionalGeneration": MROPE,
    "Qwen3VLForConditionalGeneration": {},
    "SiglipModel": {},
    "SmolVLMForConditionalGeneration": {},
    "VoxtralForConditionalGeneration": {},
}

GROUPS: dict[str, tuple[str, Rows]] = {
    "dense": ("text", DENSE),
    "hybrid": ("text", HYBRID),
    "mixtures": ("text", MIXTURES),
    "encoder-decoder": ("two texts", ENCODER_DECODER),
    "encoders": ("text", ENCODERS),
    "vision": ("image", VISION),
    "audio": ("sound", AUDIO),
    "multimodal": ("text", MULTIMODAL),
}
"""Group -> what its models are run on, its rows."""
TAKES = {
    "EncodecModel": "channel",
    "ASTForAudioClassification": "spectrum",
    "BlipForConditionalGeneration": "text and image",
    "Blip2ForConditionalGeneration": "text and image",
    "CLIPModel": "text and image",
    "ParakeetForCTC": "frames",
    "SiglipModel": "text and image",
    "VideoMAEForVideoClassification": "video",
    "SpeechT5ForSpeechToText": "sound and text",
    "Wav2Vec2BertForCTC": "wide frames",
    "WhisperForConditionalGeneration": "mel",
}
"""Rows that take something else than their group."""

ALL = {
    name: Architecture(name, group, TAKES.get(name, takes), settings)
    for group, (takes, rows) in GROUPS.items()
    for name, settings in rows.items()
}
