"""TRL's supervised fine-tuning, packed and padding-free: three steps whose losses are those of `sdpa`.

Runs where TRL is installed (`nox -s trl`). Its packing sends the bounds of documents, their numbers (`seq_idx`, which
was refused) and their positions through every layer.
"""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from ..models import VOCABULARY, tiny_config

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
tokenizers = pytest.importorskip("tokenizers")

pytestmark = pytest.mark.usefixtures("through_torch")
STEPS = 3
PACKING = {"packing": True, "max_length": 48}
PADDING_FREE = {"padding_free": True, "max_length": None}
PADDED = {"max_length": 48}


def tokenizer() -> PreTrainedTokenizerFast:
    """A word for each id."""
    words = ["<pad>", "<bos>", "<eos>", *(f"w{i}" for i in range(3, VOCABULARY))]
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>")
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def documents() -> datasets.Dataset:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, 14, (48,), generator=generator).tolist()
    ids = [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    return datasets.Dataset.from_dict({"text": [" ".join(f"w{i}" for i in each) for each in ids]})


def together(collate):
    """The same batches as one document each: what happens where documents are not kept apart."""

    def collated(examples):
        batch = collate(examples)
        for name in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"):
            batch.pop(name, None)
        batch["position_ids"] = torch.arange(batch["input_ids"].shape[1])[None]
        return batch

    return collated


def losses(folder, implementation: str, batches=None, apart: bool = True, **options) -> list[float]:
    """The loss of each step; `batches` collects the names of what each batch held."""
    config = tiny_config("llama", eos_token_id=2)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=implementation)
    arguments = trl.SFTConfig(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=2, learning_rate=1e-2,
        logging_steps=1, report_to="none", use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True, seed=0,
        **options,
    )  # fmt: skip
    trainer = trl.SFTTrainer(model, args=arguments, train_dataset=documents(), processing_class=tokenizer())
    if not apart:
        trainer.data_collator = together(trainer.data_collator)
    if batches is not None:
        collate = trainer.data_collator

        def noted(examples):
            batch = collate(examples)
            batches.append(batch.keys())
            return batch

        trainer.data_collator = noted
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("options", [PACKING, PADDING_FREE, PADDED], ids=["packing", "padding_free", "padded"])
def test_losses_are_sdpas(tmp_path, options):
    batches = []
    got = losses(tmp_path / "ours", "flashcore", batches, **options)
    want = losses(tmp_path / "sdpa", "sdpa", **options)
    print(options, "flashcore", got, "sdpa", want)
    assert len(got) == len(want) == STEPS
    assert got == pytest.approx(want, abs=1e-4)
    assert abs(got[0] - got[-1]) > 1e-2  # it trains
    if options is not PADDED:
        assert all({"seq_idx", "cu_seq_lens_q", "max_length_q", "position_ids"} <= keys for keys in batches)


@pytest.mark.parametrize("options", [PACKING, PADDING_FREE], ids=["packing", "padding_free"])
def test_documents_that_see_each_other_have_other_losses(tmp_path, options):
    """The control: a backend that ignored where documents begin would not pass above."""
    apart = losses(tmp_path / "apart", "flashcore", **options)
    joined = losses(tmp_path / "joined", "flashcore", apart=False, **options)
    print(options, "apart", apart, "joined", joined)
    assert abs(apart[0] - joined[0]) > 1e-2
