"""import flash_attn, where FlashAttention is not installed."""

import importlib.util
import sys
from types import ModuleType

import pytest
from flashcore_kernels import flash_attn as ours
from flashcore_kernels.flash_attn import fa3, install_as_flash_attn, uninstall_as_flash_attn


@pytest.fixture(autouse=True)
def put_back():
    if importlib.util.find_spec("flash_attn") is not None:
        pytest.skip("FlashAttention is installed here")
    yield
    uninstall_as_flash_attn()
    assert not [name for name in sys.modules if name.partition(".")[0] in ("flash_attn", "flash_attn_interface")]


def test_imports_find_our_functions():
    with pytest.raises(ModuleNotFoundError):
        import flash_attn
    install_as_flash_attn()
    install_as_flash_attn()  # again: nothing happens

    import flash_attn
    import flash_attn.flash_attn_interface as interface
    from flash_attn.bert_padding import index_first_axis, pad_input, unpad_input  # noqa: F401

    assert flash_attn.flash_attn_func is ours.flash_attn_func is interface.flash_attn_func
    assert interface.flash_attn_with_kvcache is ours.flash_attn_with_kvcache and unpad_input is ours.unpad_input
    assert flash_attn.bert_padding.pad_input is ours.pad_input
    import flash_attn_interface

    assert flash_attn_interface.flash_attn_func is fa3.flash_attn_func
    assert tuple(int(part) for part in flash_attn.__version__.split(".")) >= (2, 1, 0)
    assert importlib.util.find_spec("flash_attn") is not None

    uninstall_as_flash_attn()
    assert importlib.util.find_spec("flash_attn") is None
    uninstall_as_flash_attn()


def test_what_is_missing_says_where():
    install_as_flash_attn()
    with pytest.raises(ImportError, match=r"flash_attn_combine.*flashcore_kernels.flash_attn.install\.py"):
        from flash_attn import flash_attn_combine  # noqa: F401
    with pytest.raises(ModuleNotFoundError, match="flash_attn.layers"):
        import flash_attn.layers.rotary  # noqa: F401


@pytest.mark.parametrize("name", ["flash_attn", "flash_attn_interface"])
def test_the_real_one_stays(name, tmp_path, monkeypatch):
    package = tmp_path / name
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RuntimeError, match=f"there is a {name} already, at {package}"):
        install_as_flash_attn()
    assert name not in sys.modules
    monkeypatch.undo()
    sys.path_importer_cache.pop(str(tmp_path), None)


def test_what_somebody_else_put_there_stays(monkeypatch):
    somebodys = ModuleType("flash_attn")
    monkeypatch.setitem(sys.modules, "flash_attn", somebodys)
    with pytest.raises(RuntimeError, match="an unknown place"):
        install_as_flash_attn()
    assert sys.modules["flash_attn"] is somebodys
    monkeypatch.undo()

    install_as_flash_attn()
    sys.modules["flash_attn"] = somebodys
    uninstall_as_flash_attn()
    assert sys.modules.pop("flash_attn") is somebodys
