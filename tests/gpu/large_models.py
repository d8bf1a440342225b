"""Llama-3.1-8B and Mistral-7B-v0.1 at full size with random weights, for those who cannot download the real ones."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SHAPES = {
    "Llama-3.1-8B": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "rope_theta": 500000.0,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
    },
    "Mistral-7B-v0.1": {
        "model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "rope_theta": 10000.0,
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "sliding_window": 4096,
    },
}  # fmt: skip

# A random model as such tells rounding from defects badly: in bf16 eager and sdpa disagree on every second token. What
# trained models have makes this one steadier: embeddings that no single layer drowns (of size EMBEDDING, and the MLPs'
# outputs divided by sqrt(2 * layers), as in GPT-2), and few tokens that compete (LIKELY_TOKENS rows of the output
# embedding are HOW_MUCH times longer). Tried on a smaller model: 6 % of the steps are then within the distance of eager
# to sdpa, and a softmax scale of x1.5 still changes 10 % of the tokens.
EMBEDDING, LIKELY_TOKENS, HOW_MUCH = 20.0, 100, 8.0


TINY = {
    "vocab_size": 500, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


def make_model(name: str, *, device: str = "cuda", seed: int = 0, layers: int | None = None, tiny: bool = False):
    """The model in bf16 on `device`, in eval mode, with initializer_range about sqrt(2 / hidden_size).

    Args:
        name: of SHAPES.
        layers: fewer layers than the shape has, for a quick look.
        tiny: narrow enough to try a script on a CPU.
    """
    shape = {**SHAPES[name], **(TINY if tiny else {})}
    if layers:
        shape["num_hidden_layers"] = layers
    config = AutoConfig.for_model(
        shape.pop("model_type"), **shape, initializer_range=(2 / shape["hidden_size"]) ** 0.5, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
        with torch.no_grad():
            model.model.embed_tokens.weight.normal_(0.0, EMBEDDING)
            for layer in model.model.layers:
                layer.mlp.down_proj.weight /= (2 * config.num_hidden_layers) ** 0.5
            model.lm_head.weight[torch.randperm(config.vocab_size)[:LIKELY_TOKENS]] *= HOW_MUCH
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def random_prompts(batch_size: int, length: int, vocabulary: int, seed: int = 0) -> list[list[int]]:
    """Token ids of `batch_size` prompts; the first has `length` tokens, each further one is shorter."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(3, vocabulary, (length - row * length // (2 * batch_size),), generator=generator).tolist()
        for row in range(batch_size)
    ]
