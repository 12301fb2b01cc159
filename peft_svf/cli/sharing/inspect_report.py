"""The report of `peft-svf inspect`: facts, levers, comparison and pictures, as text or as JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from peft_svf.cli.sharing.inspect_pictures import check_pictures, draw_pictures
from peft_svf.cli.sharing.inspected_experts import Inspected, find_experts, with_unique_names
from peft_svf.cli.terminal import one_line, table, visible, with_interval
from peft_svf.experts import ExpertError
from peft_svf.experts.algebra import chance_overlap, cosine_similarity, overlap
from peft_svf.plots import (
    LeverTotals,
    Spectra,
    grid_text,
    lever_totals,
    levers_table,
    read_spectra,
    relative_changes,
    signed,
)


NOT_RECORDED = "not recorded"
FACTS = {  # fields of ExpertCardData that are shown where they are recorded, as they are called in text
    "description": "description",
    "method": "method",
    "reward": "reward",
    "kl_coefficient": "KL coefficient",
    "learning_rate": "learning rate",
    "steps": "steps",
    "batch_size": "answers in a step",
    "seeds": "seeds",
    "training_seconds": "training seconds",
    "hardware": "hardware",
    "precision": "precision",
    "license": "license",
}
WIDTH = 100  # characters of a fact


def run_inspect(arguments: argparse.Namespace) -> None:
    """
    Read the experts, draw what is asked for, and print.

    Raises:
        ValueError: For arguments that cannot work; nothing was read or written.
        ExpertError: If an expert cannot be read, or experts or models do not belong together.
        OSError: If a picture cannot be written.
    """
    check_pictures(arguments)
    own = find_experts(arguments.expert, arguments.subfolder, arguments.revision)
    others = [one for source in arguments.compare for one in find_experts(source, None)]
    experts = with_unique_names([*own, *others])
    own = experts[: len(own)]
    spectra, changes = None, {}
    if arguments.model is not None:
        names = list(dict.fromkeys(name for one in own for name in one.expert.offsets))
        spectra = read_spectra(arguments.model, names, show_progress=sys.stderr.isatty())
        changes = {one.name: relative_changes(one.expert, spectra) for one in own}
    comparison = compare(experts)
    pictures = draw_pictures(own, experts, spectra, arguments)
    if arguments.json:
        found = {
            "experts": [expert_json(one, changes.get(one.name)) for one in own],
            "comparison": comparison,
            "spectra": None if spectra is None else {"statement": spectra.statement(), "shares": spectra.shares()},
            "pictures": [str(path) for path in pictures],
        }
        print(json.dumps(found, indent=2, allow_nan=False))
        return
    for one in own:
        print(visible(expert_text(one, changes.get(one.name))), end="\n\n")
    print(visible(closing_text(experts, comparison, spectra, [str(path) for path in pictures])), end="")


def expert_text(one: Inspected, changes: Mapping[str, float] | None) -> str:
    """Facts, results and levers of one expert."""
    sections = [f"{one.name}\n{table(facts_rows(one))}"]
    if one.facts.results:
        rows = [("task", "prompts", "base model", "expert")]
        for result in one.facts.results:
            base = _share(result.base, result.base_interval)
            rows.append((one_line(result.task), str(result.n), base, _share(result.expert, result.expert_interval)))
        sections.append(f"Success [95 % interval]\n{table(rows, right=(1,))}")
    sections.append(levers_table(one.expert))
    if changes is not None:
        text = grid_text(changes, lambda names: f"{100 * max(changes[name] for name in names):.2f}")
        sections.append(f"Change of the weight, ‖ΔW‖ / ‖W‖ in %\n{text}")
    return "\n\n".join(sections)


def facts_rows(one: Inspected) -> list[tuple[str, str]]:
    """The facts, those that matter most shown as missing where they are."""
    facts, expert = one.facts, one.expert
    others = sorted({key.rpartition(".")[0] for key in expert.others})
    rows = [
        ("base model", facts.base_model or NOT_RECORDED),
        ("revision", facts.base_revision or NOT_RECORDED),
        ("fingerprint", facts.fingerprint_id or NOT_RECORDED),
        ("adapted", facts.adapted_modules or NOT_RECORDED),
        ("offsets", f"{facts.trained_parameters:,}, in {one.file_bytes:,} bytes"),
        ("label", facts.label or NOT_RECORDED),
        ("task", facts.task or NOT_RECORDED),
        ("origin", _origin_text(facts.origin) or facts.method or NOT_RECORDED),
        ("results", f"{len(facts.results)}, below" if facts.results else NOT_RECORDED),
    ]
    if others:
        rows.append(("trained besides", ", ".join(others)))
    for field, name in FACTS.items():
        value = getattr(facts, field)
        if value not in (None, (), ""):
            rows.append((name, ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)))
    if one.fault is not None:
        rows.append(("expert.json", f"is left out: {one.fault}"))
    return [(name, one_line(value, WIDTH)) for name, value in rows]


def compare(experts: Sequence[Inspected]) -> dict[str, Any] | None:
    """
    Cosine similarity and overlap of every pair; `None` of one expert alone.

    Raises:
        ExpertError: The experts belong to different base models.
    """
    if len(experts) < 2:
        return None
    several = [one.expert for one in experts]
    try:
        cosine, common = cosine_similarity(several), overlap(several)
    except ExpertError as error:
        raise ExpertError(f"These experts cannot be compared: {error}") from error
    return {
        "experts": [one.name for one in experts],
        "cosine": cosine.tolist(),
        "overlap": common.tolist(),
        "overlap_of_unrelated": chance_overlap(several),
    }


def closing_text(
    experts: Sequence[Inspected],
    comparison: Mapping[str, Any] | None,
    spectra: Spectra | None,
    pictures: Sequence[str],
) -> str:
    """What concerns all experts together."""
    sections = []
    if comparison is not None:
        rows = [("expert", "mean of z − 1", "root mean square", "first tenth holds")]
        for one in experts:
            totals = lever_totals(one.expert, most=1)
            tenth = "" if totals.first_tenth is None else f"{100 * totals.first_tenth:.1f} %"
            rows.append((one.name, signed(totals.mean, 4), f"{totals.rms:.4f}", tenth))
        sections.append(f"All experts\n{table(rows, right=(1, 2, 3))}")
        sections.append(f"Cosine similarity of z − 1\n{_matrix(comparison, 'cosine')}")
        chance = comparison["overlap_of_unrelated"]
        head = f"Share of the most moved tenth in common ({chance:.2f} for unrelated experts)"
        sections.append(f"{head}\n{_matrix(comparison, 'overlap')}")
    if spectra is not None:
        sections.append(f"Spectra of {spectra.source}\n{spectra.statement()}")
    if pictures:
        sections.append("\n".join(f"Picture: {path}" for path in pictures))
    return "".join(f"{section}\n\n" for section in sections)[:-1]


def expert_json(one: Inspected, changes: Mapping[str, float] | None) -> dict[str, Any]:
    """One expert, of JSON types; what is not recorded is null."""
    facts, totals = one.facts, lever_totals(one.expert)
    named = {"base_model": facts.base_model, "base_revision": facts.base_revision}
    return {
        "name": one.name,
        "source": str(one.folder),
        **named,
        "fingerprint_id": facts.fingerprint_id,
        "label": facts.label,
        "modules": {name: list(offset.shape) for name, offset in one.expert.offsets.items()},
        "parameters": facts.trained_parameters,
        "file_bytes": one.file_bytes,
        "facts": dict(one.expert.metadata) if one.fault is None else None,
        "fault": one.fault,
        "levers": _totals_json(totals),
        "relative_changes": None if changes is None else dict(changes),
    }


def _totals_json(totals: LeverTotals) -> dict[str, Any]:
    return {**asdict(totals), "largest": [asdict(one) for one in totals.largest]}


def _share(share: float | None, interval: tuple[float, float] | None) -> str:
    if share is None:
        return NOT_RECORDED
    return f"{100 * share:.1f} %" if interval is None else with_interval(share, *interval)


def _origin_text(origin: Mapping[str, Any]) -> str:
    return ": ".join(str(origin[key]) for key in ("operation", "statement") if origin.get(key))


def _matrix(comparison: Mapping[str, Any], key: str) -> str:
    names = comparison["experts"]
    rows = [["", *names]]
    rows += [
        [name, *(signed(value, 2).replace("+", " ") for value in row)]
        for name, row in zip(names, comparison[key], strict=True)
    ]
    return table(rows, right=range(1, len(names) + 1))
