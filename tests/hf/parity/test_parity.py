"""Parity: the rule on made-up logits, the runs on an untrained model, the command in a process of its own."""

import json
import os
import subprocess
import sys
from collections import Counter

import pytest
import torch
import transformers
from flashcore_kernels import FlashcoreFallbackWarning, interpreter_pace
from flashcore_kernels.fallback import forget_warnings
from flashcore_kernels.portable.tables import row_for
from packaging.version import Version

from flashcore_hf.__main__ import parser
from flashcore_hf.parity import command, tiny_models
from flashcore_hf.parity.rules import Settings, check_paths, compare, compare_model, top2_gap, unexcused
from flashcore_hf.parity.runs import Cell, Run, caught_at, generate, left_padded, load, wrong_scale

from ..models import VOCABULARY, model_pair

STEPS = 20
needs_the_cache = pytest.mark.skipif(
    Version(transformers.__version__) < Version("4.57"), reason="FlashCoreCache needs Transformers 4.57"
)


def made_up(batch_size: int = 2, steps: int = STEPS, seed: int = 0) -> Run:
    """A reference run with top-2 gaps of at least 1."""
    logits = torch.randn(batch_size, steps, 16, generator=torch.Generator().manual_seed(seed))
    best = logits.argmax(-1, keepdim=True)
    logits.scatter_add_(-1, best, torch.ones_like(best, dtype=torch.float32))
    return Run(best[..., 0], logits, 1.0, Counter(flashcore_decode=4))


def swap_top2(run: Run, sequence: int, step: int) -> Run:
    """The same run with the two likeliest tokens of one step exchanged."""
    logits = run.logits.clone()
    first, second = logits[sequence, step].topk(2).indices.tolist()
    logits[sequence, step, [first, second]] = logits[sequence, step, [second, first]]
    return run._replace(logits=logits, tokens=logits.argmax(-1))


class TestRule:
    def test_equal_runs_pass(self):
        reference = made_up()
        found = compare(reference, reference)
        assert found.failures == [] and found.first is None and found.equal == 2 * STEPS
        assert found.largest_difference == 0 and not found.excusable.any()

    def test_float32_must_be_exact_however_small_the_gap(self):
        reference = made_up()
        found = compare(reference, swap_top2(reference, 1, 7))
        assert found.first == (1, 7) and len(found.failures) == 1
        assert found.gap == pytest.approx(top2_gap(reference.logits)[1, 7].item())

    def test_differences_after_a_divergence_count_for_nothing(self):
        """The continuation differs because the text does; only steps with the same prefix are comparable."""
        reference = made_up()
        other = swap_top2(reference, 0, 5)
        other.logits[0, 6:] += 100.0
        assert compare(reference, other).largest_difference < 10

    @pytest.mark.parametrize("noise, excused", [(0.999, False), (1.001, True)])
    def test_low_precision_excuses_by_the_noise_of_that_very_step(self, noise, excused):
        reference = made_up()
        candidate = swap_top2(reference, 1, 7)
        gap = top2_gap(reference.logits)
        allowed = torch.zeros_like(gap)
        allowed[1, 7] = gap[1, 7] * noise
        assert (compare(reference, candidate, candidate, allowed).failures == []) is excused

    def test_noise_at_another_step_excuses_nothing(self):
        reference = made_up()
        candidate = swap_top2(reference, 1, 7)
        noise = torch.zeros(2, STEPS)
        noise[1, 8] = noise[0, 7] = 100.0
        assert len(compare(reference, candidate, candidate, noise).failures) == 2  # free and forced

    def test_forced_disagreement_after_an_excused_one_fails(self):
        reference = made_up()
        free = swap_top2(reference, 0, 3)
        noise = torch.zeros(2, STEPS)
        noise[0, 3] = 100.0
        assert compare(reference, free, free, noise).failures == []
        assert compare(reference, free, swap_top2(free, 0, 9), noise).failures

    def test_too_many_excusable_steps_void_the_run(self):
        reference = made_up()
        noise = torch.zeros(2, STEPS)
        noise[0, :4] = 100.0  # 4 of 40 steps: just allowed
        assert compare(reference, reference, reference, noise).failures == []
        noise[1, 0] = 100.0
        (failure,) = compare(reference, reference, reference, noise).failures
        assert failure.startswith("void")

    def test_the_other_reference_is_held_to_the_same_rule(self):
        """Its disagreement counts where flashcore is nearer to the reference than the two best logits to each other."""
        reference = made_up()
        other = swap_top2(reference, 1, 7).tokens
        near = reference._replace(logits=reference.logits.clone())
        assert unexcused(reference, near, other) == 1 and unexcused(reference, near, reference.tokens) == 0
        near.logits[1, 7, 0] += 1.01 * top2_gap(reference.logits)[1, 7]
        assert unexcused(reference, near, other) == 0

    def test_nan_fails_even_where_tokens_agree(self):
        reference = made_up()
        candidate = reference._replace(logits=reference.logits.clone())
        candidate.logits[0, 0, 3] = torch.nan
        assert any("NaN" in failure for failure in compare(reference, candidate).failures)

    @pytest.mark.parametrize(
        "paths, passes",
        [
            ({"flashcore_decode": 3, "flashcore_forward": 1}, True),
            ({"flashcore_decode": 3, "torch": 1}, False),
            ({"torch": 1}, False),
            ({}, False),
        ],
    )
    def test_paths(self, paths, passes):
        assert (check_paths(Counter(paths)) == []) is passes


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """An untrained LLaMA with weights large enough for peaked logits, saved as safetensors."""
    path = tmp_path_factory.mktemp("parity") / "model"
    model_pair("llama", initializer_range=0.3)[0].save_pretrained(path)
    assert (path / "model.safetensors").exists()
    return str(path)


def cells(steps: int = 8) -> list[Cell]:
    prompts = [[5, 9, 2, 11, 60, 7, 8], [3, 4, 5]]
    return [Cell("dynamic", prompts, steps, 0), Cell("static", prompts[:1], steps, 0)]


def settings(checkpoint: str, **changes) -> Settings:
    values = dict(
        name="tiny", path=checkpoint, dtype=torch.float32, device="cpu", references=("eager", "sdpa"), cells=cells(),
        interpreted=True,
    )  # fmt: skip
    return Settings(**{**values, **changes})


class TestRuns:
    def test_float32_rows_pass(self, checkpoint):
        reported = []
        rows = compare_model(settings(checkpoint), lambda what, steps: reported.append(steps))
        assert [(row.cell, row.reference) for row in rows] == [
            ("dynamic, B=2 left-padded", "eager"), ("dynamic, B=2 left-padded", "sdpa"),
            ("static, B=1 unpadded", "eager"), ("static, B=1 unpadded", "sdpa"),
        ]  # fmt: skip
        for row in rows:
            assert row.passed, row.failures
            assert row.tokens_equal == row.tokens and row.first_divergence is None
            assert row.paths == {"flashcore_decode": 2 * 8}  # two layers; this prompt is short enough for decode
            assert row.control_caught_at is not None
        assert sum(reported) == settings(checkpoint).total_steps()

    def test_bfloat16_rows_are_judged_under_forced_tokens(self, checkpoint):
        rows = compare_model(settings(checkpoint, dtype=torch.bfloat16, references=("sdpa",), cells=cells()[:1]))
        assert not [f for row in rows for f in row.failures if not f.startswith("void")]

    @needs_the_cache
    def test_fp8_rows_report(self, checkpoint):
        """e4m3 changes logits, by a few percent."""
        from flashcore_hf.parity.fp8 import compare_fp8

        reported = []
        (row,) = compare_fp8(settings(checkpoint), lambda what, steps: reported.append(steps))
        assert row.passed and row.cell == "fp8, B=2 left-padded" and row.tokens == 16
        assert 0 < row.relative_error < 0.2 and row.largest_difference > 0
        assert row.steps_equal >= 0.5 and sum(reported) == 3 * 8

    def test_wrong_scale_fails_and_is_put_back(self, checkpoint):
        reference = generate(load(checkpoint, "eager", torch.float32, "cpu"), cells()[0])
        model = load(checkpoint, "flashcore", torch.float32, "cpu")
        excusable = torch.zeros_like(reference.tokens, dtype=torch.bool)
        with wrong_scale(model):
            wrong = generate(model, cells()[0])
            caught = caught_at(model, cells()[0], reference.tokens, excusable)
            assert caught_at(model, cells()[0], reference.tokens, ~excusable) is None  # all is excused
        found = compare(reference, wrong)
        # The first divergence of the free run and of the forced one have the same prefix.
        assert found.failures and caught == found.first[1]
        assert compare(reference, generate(model, cells()[0])).failures == []

    def test_fallback_fails_the_row(self, checkpoint):
        with pytest.warns(FlashcoreFallbackWarning):
            forget_warnings()
            rows = compare_model(settings(checkpoint, dtype=torch.float64, references=("eager",), cells=cells()[:1]))
        assert any("not served by a kernel" in failure for failure in rows[0].failures)

    def test_forced_tokens_are_what_generate_continues_with(self, checkpoint):
        model = load(checkpoint, "sdpa", torch.float32, "cpu")
        free = generate(model, cells()[0])
        forced = generate(model, cells()[0], forced=free.tokens)
        assert torch.equal(forced.tokens, free.tokens)
        torch.testing.assert_close(forced.logits, free.logits, rtol=0, atol=1e-5)
        # Other tokens give other logits from the second step on.
        other = generate(model, cells()[0], forced=(free.tokens + 1) % VOCABULARY)
        assert not torch.allclose(other.logits[:, 1:], free.logits[:, 1:], atol=1e-2)

    def test_the_pace_of_the_interpreter_is_for_a_while(self):
        def row(arch):
            return row_for("flashcore_forward", arch, torch.float32, 64)

        before, on_a_gpu = row(0), row(90)
        with interpreter_pace(keys=256, queries=64), pytest.raises(RuntimeError):
            assert (row(0).block_m, row(0).block_n) == (64, 256) and row(90) == on_a_gpu
            raise RuntimeError
        assert row(0) == before != on_a_gpu and before.block_n < 256

    def test_a_model_without_scaling_is_refused(self):
        with pytest.raises(ValueError, match="scaling"), wrong_scale(torch.nn.Linear(2, 2)):
            pass

    def test_left_padding(self):
        ids, mask = left_padded([[7, 8, 9], [5]], pad_token_id=1)
        assert ids.tolist() == [[7, 8, 9], [1, 1, 5]] and mask.tolist() == [[1, 1, 1], [0, 0, 1]]


class TestTinyModels:
    def test_corpus_is_plain_text_without_the_padding_byte(self):
        text = tiny_models.corpus_tokens()
        assert 2000 < len(text) < 20000 and text.min() >= 10 and text.max() < 128

    @pytest.mark.parametrize("batch_size, longest", [(1, 100), (4, 100), (8, 2048), (3, 1)])
    def test_prompts(self, batch_size, longest):
        lengths = [len(prompt) for prompt in tiny_models.prompts(batch_size, longest)]
        assert len(lengths) == batch_size and lengths[0] == longest == max(lengths) and min(lengths) >= 1
        assert longest < 10 or len(set(lengths)) == batch_size

    def test_shapes_are_what_parity_promises(self):
        llama, mistral = (tiny_models.make_config(family) for family in tiny_models.FAMILIES)
        assert llama.num_attention_heads == 4 * llama.num_key_value_heads
        assert mistral.sliding_window < 100
        with pytest.raises(ValueError, match="gpt2"):
            tiny_models.make_config("gpt2")

    def test_training_learns_and_a_checkpoint_is_used_again(self, tmp_path, monkeypatch):
        monkeypatch.setattr(tiny_models, "STEPS", 12)
        monkeypatch.setattr(tiny_models.train, "__defaults__", (12, None))
        losses = []
        path = tiny_models.ensure_checkpoint("mistral", tmp_path, lambda step, loss: losses.append(loss))
        assert len(losses) == 12 and losses[-1] < losses[0] - 1
        assert (path / "model.safetensors").exists()
        assert tiny_models.ensure_checkpoint("mistral", tmp_path, lambda step, loss: losses.append(loss)) == path
        assert len(losses) == 12


class TestCommand:
    def arguments(self, *argv):
        return parser().parse_args(["parity", *argv])

    def test_prompts_from_a_file(self, tmp_path):
        file = tmp_path / "prompts.txt"
        file.write_text("ab\n\n[1, 2, 3]\n")
        assert command.read_prompts(str(file), None) == [[97, 98], [1, 2, 3]]
        file.write_text("\n")
        with pytest.raises(ValueError, match="no prompt"):
            command.read_prompts(str(file), None)

    def test_more_sequences_than_prompts_are_refused(self, tmp_path, capsys):
        file = tmp_path / "prompts.txt"
        file.write_text("one\ntwo\n")
        assert command.main(self.arguments("--prompts", str(file), "--batch", "3")) == 1
        assert "--batch 3" in capsys.readouterr().out

    @pytest.mark.parametrize("argv", [["--batch", "0"], ["--max-new-tokens", "0"], ["--reference", "flashcore"]])
    def test_bad_arguments(self, argv):
        with pytest.raises(SystemExit):
            self.arguments(*argv)

    def test_failing_import_is_reported(self, monkeypatch, capsys):
        monkeypatch.setattr(command, "import_error", "ImportError: no such thing")
        assert command.main(self.arguments()) == 1
        assert "no such thing" in capsys.readouterr().out

    @needs_the_cache
    def test_fp8_is_a_table_of_its_own(self, checkpoint, tmp_path, capsys):
        file = tmp_path / "rows.json"
        arguments = self.arguments(
            "--model", checkpoint, "--device", "cpu", "--batch", "1", "--cache", "dynamic", "--reference", "eager",
            "--max-new-tokens", "6", "--prompts", str(write_prompts(tmp_path)), "--fp8", "--json", str(file),
        )  # fmt: skip
        assert command.main(arguments) == 0
        assert "An fp8 cache beside one in the model's dtype" in capsys.readouterr().out
        (row,) = json.loads(file.read_text())["fp8"]
        assert 0 < row["relative_error"] < 0.2 and row["tokens"] == 6

    def test_command_starts_again_with_the_interpreter(self, checkpoint, tmp_path):
        """In a process without TRITON_INTERPRET, as a user's; the exit status and the JSON say that rows passed."""
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        file = tmp_path / "rows.json"
        done = subprocess.run(
            [sys.executable, "-m", "flashcore_hf", "parity", "--model", checkpoint, "--device", "cpu", "--batch", "2",
             "--cache", "static", "--reference", "sdpa", "--prompt-length", "9", "--max-new-tokens", "6",
             "--prompts", str(write_prompts(tmp_path)), "--json", str(file)],
            env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        assert "interpreter" in done.stdout and "1 rows passed, 0 failed" in done.stdout
        (row,) = json.loads(file.read_text())["rows"]
        assert row["passed"] and row["paths"].keys() == {"flashcore_decode"}


def write_prompts(folder):
    """Two prompts of token ids within the tiny vocabulary."""
    file = folder / "prompts.txt"
    file.write_text("[5, 9, 2, 11, 60, 7, 8]\n[3, 4, 5]\n")
    return file
