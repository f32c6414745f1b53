"""InternLM2 as the code of a model's folder: attention is written out, as such code mostly has it.

One matmul gives each group of heads its queries, then its key and its value.
"""

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_internlm2 import InternLM2Config


class Norm(nn.Module):
    """RMS norm."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        """Divide by the root of the mean square."""
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


class Attention(nn.Module):
    """Causal attention over groups of heads."""

    def __init__(self, config):
        super().__init__()
        self.groups = config.num_key_value_heads
        self.queries = config.num_attention_heads // self.groups
        self.size = config.hidden_size // config.num_attention_heads
        self.theta = config.rope_parameters["rope_theta"]
        self.wqkv = nn.Linear(config.hidden_size, (self.queries + 2) * self.groups * self.size, bias=False)
        self.wo = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def rotate(self, x):
        """Rotate [batch, heads, tokens, size] by the positions."""
        frequencies = self.theta ** (-torch.arange(0, self.size, 2).float() / self.size)
        angles = torch.arange(x.shape[-2]).float()[:, None] * frequencies
        angles = torch.cat([angles, angles], -1)
        first, second = x.chunk(2, -1)
        return x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()

    def forward(self, x):
        """Attend to what is before."""
        batch, tokens, _ = x.shape
        joined = self.wqkv(x).view(batch, tokens, self.groups, self.queries + 2, self.size)
        q = self.rotate(joined[:, :, :, :-2].flatten(2, 3).transpose(1, 2))
        k = self.rotate(joined[:, :, :, -2].transpose(1, 2)).repeat_interleave(self.queries, 1)
        v = joined[:, :, :, -1].transpose(1, 2).repeat_interleave(self.queries, 1)
        scores = q @ k.transpose(-1, -2) / self.size**0.5
        hidden = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        return self.wo((weights @ v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """A gated product."""

    def __init__(self, config):
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        """Gate, and project back."""
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


class Layer(nn.Module):
    """A decoder layer."""

    def __init__(self, config):
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = Norm(config.hidden_size, config.rms_norm_eps)
        self.ffn_norm = Norm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x):
        """Both parts, each added."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.ffn_norm(x))


class Model(nn.Module):
    """All layers."""

    def __init__(self, config):
        super().__init__()
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = Norm(config.hidden_size, config.rms_norm_eps)


class InternLM2ForCausalLM(PreTrainedModel, GenerationMixin):
    """With the head."""

    config_class = InternLM2Config
    base_model_prefix = "model"
    _no_split_modules = ("Layer",)

    def __init__(self, config):
        super().__init__(config)
        self.model = Model(config)
        self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        """Of tokens."""
        return self.model.tok_embeddings

    def get_output_embeddings(self):
        """The head."""
        return self.output

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs):
        """It keeps nothing between steps."""
        return {"input_ids": input_ids}

    def forward(self, input_ids, attention_mask=None, **_):
        """Logits of every token."""
        x = self.model.tok_embeddings(input_ids)
        for layer in self.model.layers:
            x = layer(x)
        return CausalLMOutputWithPast(logits=self.output(self.model.norm(x)))
