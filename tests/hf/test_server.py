"""`python -m flashcore_hf serve`: Transformers' server, which does not know the name."""

import pytest

from flashcore_hf import serve
from flashcore_hf.__main__ import main


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
