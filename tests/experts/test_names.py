"""What `peft_svf` and `peft_svf.experts` offer: every name, each the one of its own module."""

from __future__ import annotations

from importlib import import_module

import pytest

import peft_svf
from peft_svf import experts


@pytest.mark.parametrize("package", [peft_svf, experts], ids=lambda package: package.__name__)
def test_every_public_name_is_there(package):
    assert [name for name in package.__all__ if getattr(package, name, None) is None] == []
    assert len(set(package.__all__)) == len(package.__all__)
    with pytest.raises(AttributeError, match=rf"module '{package.__name__}' has no attribute 'typo'"):
        package.typo  # noqa: B018


@pytest.mark.parametrize(
    ("package", "name", "place"),
    [
        (peft_svf, "push_expert", "hub.push"),
        (peft_svf, "push_bank", "hub.push"),
        (peft_svf, "FewShotDispatcher", "dispatch.few_shot.dispatcher"),
        (experts, "save_merged", "experts.merged_export"),
        (experts, "save_for_mergekit", "experts.mergekit"),
        (experts, "import_released_expert", "experts.released_code"),
    ],
)
def test_what_comes_later_is_the_same_object(package, name, place):
    assert getattr(package, name) is getattr(import_module(f"peft_svf.{place}"), name)


def test_algebra_and_transfer_are_packages_whatever_was_imported_before():
    assert experts.algebra is import_module("peft_svf.experts.algebra")
    assert experts.transfer is import_module("peft_svf.experts.transfer")
    from peft_svf.experts import transfer

    assert callable(transfer.transfer)
