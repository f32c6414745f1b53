"""The configuration of InternLM2, which transformers does not have: it lies in a model's folder."""

from transformers import PretrainedConfig


class InternLM2Config(PretrainedConfig):
    """Sizes of a model."""

    model_type = "internlm2"

    def __init__(
        self,
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        rope_parameters=None,
        hidden_act="silu",
        tie_word_embeddings=False,
        **more,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.rope_parameters = rope_parameters or {"rope_type": "default", "rope_theta": rope_theta}
        self.hidden_act = hidden_act
        self.tie_word_embeddings = tie_word_embeddings
        super().__init__(**more)
