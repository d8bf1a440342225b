"""`python -m flashcore_hf serve`: Transformers' server, which does not know the name."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from flashcore_kernels.cache import paged
from flashcore_kernels.device import Device

from flashcore_hf import serve, serving
from flashcore_hf.__main__ import main

from .models import VOCABULARY, model_pair
from .test_serving import each_alone, some_prompts, works

TOKENS = 8


class TestServer:
    """`python -m flashcore_hf serve`: the server itself needs packages that are not installed here."""

    @pytest.fixture
    def manager(self, monkeypatch):
        module = pytest.importorskip("transformers.cli.serving.model_manager")
        kind = module.ModelManager
        monkeypatch.setattr(kind, "_validate_args", kind._validate_args)  # put back after the test
        return kind

    def test_takes_the_name(self, manager):
        with pytest.raises(ValueError, match="Unsupported attention implementation: 'flashcore'"):
            manager(attn_implementation="flashcore")
        serve.accept_name(manager)
        assert manager(attn_implementation="flashcore").attn_implementation == "flashcore"
        with pytest.raises(ValueError, match="Unsupported attention implementation: 'other'"):
            manager(attn_implementation="other")

    def test_hands_on_its_arguments(self, manager, monkeypatch):
        cli = pytest.importorskip("transformers.cli.transformers")
        called = []
        monkeypatch.setattr(cli, "app", called.append)
        assert main(["serve", "org/model", "--port", "1"]) == 0
        assert called == [["serve", "org/model", "--port", "1", "--attn-implementation", "flashcore"]]


def text_of(tokens: list[int]) -> str:
    return " ".join(f"t{token}" for token in tokens)


def save_tokenizer(folder) -> None:
    """One whose token 5 is the word t5."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"t{token}": token for token in range(VOCABULARY)}, unk_token="t1"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0").save_pretrained(folder)


@works
class TestClient:
    """An `openai` client of a server that batches continuously, on a CPU through PyTorch."""

    @pytest.fixture
    def served(self, tmp_path, monkeypatch):
        """served(name) -> (client, the eager model, calls on pages that the server's model has made)."""
        openai = pytest.importorskip("openai")
        pytest.importorskip("fastapi")
        pytest.importorskip("uvicorn")
        from transformers.cli.serve import Serve
        from transformers.cli.serving.model_manager import ModelManager

        monkeypatch.setattr(ModelManager, "_validate_args", ModelManager._validate_args)
        monkeypatch.setattr(paged, "device_of", lambda device: Device("torch", reason="the test asks for it"))
        calls, find = [], serving.Served.pages
        monkeypatch.setattr(serving.Served, "pages", lambda self, *asked: calls.append(asked[0]) or find(self, *asked))
        serve.accept_name(ModelManager)
        servers = []

        def start(implementation: str):
            eager, _ = model_pair("mistral")
            eager.save_pretrained(tmp_path)
            save_tokenizer(tmp_path)
            with socket.socket() as free:
                free.bind(("localhost", 0))
                port = free.getsockname()[1]
            server = Serve(
                force_model=str(tmp_path), continuous_batching=True, attn_implementation=implementation, device="cpu",
                dtype="float32", cb_num_blocks=64, cb_max_batch_tokens=32, port=port, non_blocking=True,
            )  # fmt: skip
            servers.append(server)
            deadline = time.monotonic() + 60
            while not server.server.started and time.monotonic() < deadline:
                time.sleep(0.05)
            client = openai.OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none", timeout=120, max_retries=0)
            return client, eager, calls

        yield start
        for server in servers:
            server.kill_server()

    @staticmethod
    def complete(client, folder, prompt: list[int], stream: bool = False) -> str:
        answer = client.completions.create(
            model=str(folder), prompt=text_of(prompt), max_tokens=TOKENS, temperature=0.0, stream=stream
        )
        return "".join(chunk.choices[0].text or "" for chunk in answer) if stream else answer.choices[0].text

    @pytest.mark.filterwarnings("ignore:flashcore serves this attention call")
    def test_answers_are_those_of_generate(self, served, tmp_path):
        """Of requests at once, which share batches; the window of 6 tokens is crossed."""
        client, eager, calls = served("flashcore")
        prompts = some_prompts((9, 21, 4, 33))
        with ThreadPoolExecutor(len(prompts)) as pool:
            texts = list(pool.map(lambda prompt: self.complete(client, tmp_path, prompt), prompts))
        want = [text_of(tokens) for tokens in each_alone(eager, prompts, TOKENS)]
        assert texts == want
        assert self.complete(client, tmp_path, prompts[0], stream=True) == want[0]
        assert set(calls) == set(range(eager.config.num_hidden_layers))

    def test_under_another_name_nothing_is_ours(self, served, tmp_path):
        """The control."""
        client, eager, calls = served("sdpa")
        prompt = some_prompts((9,))[0]
        assert self.complete(client, tmp_path, prompt) == text_of(each_alone(eager, [prompt], TOKENS)[0])
        assert calls == []
