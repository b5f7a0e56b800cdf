"""`signer decode`: one JSON object for each request, in order, from arguments or standard input; never a trace."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.cli.test_listing import call

VECTORS: list[dict[str, Any]] = json.loads(
    (Path(__file__).parents[2] / "vectors" / "requests.json").read_text(encoding="utf-8")
)
FACTS = ["request_kind", "chain_id", "level", "round", "operations", "ballots"]
ATTESTATION = (
    "13ed9d217cfc81eee810737b04018acef4db74d056b79edc43e6be46cae7e4c217c22a82f01500120000518d0000000003e7ea1f"
    "67dbb0bb6cfa372cb092cd9cf786b4f1b5e5139da95b915fb95e698d"
)
TZ4_ATTESTATION = ATTESTATION.replace("82f0150012", "82f029")
PACK = "050a00000016000032041dca76bac940b478aae673e362bd15847ed8"
ANSWER = {
    "request_kind": "attestation",
    "chain_id": "NetXxkAx4woPLyu",
    "level": 20877,
    "round": 0,
    "operations": [],
    "ballots": [],
}


def decoded(*arguments: str, stdin: str | bytes = b"") -> list[dict[str, Any]]:
    """One object from each line; the status is 0 and nothing stands beside them."""
    done = call("decode", *arguments, stdin=stdin)
    assert (done.status, done.err) == (0, "")
    return [json.loads(line) for line in done.out.splitlines()]


def test_arguments_in_order() -> None:
    attestation, pack = decoded(ATTESTATION, PACK)
    assert attestation == ANSWER
    assert list(attestation) == FACTS
    assert (pack["request_kind"], pack["level"]) == ("pack", None)


@pytest.mark.parametrize("end", ["\n", "\r\n", ""])
def test_lines_of_standard_input(end: str) -> None:
    assert decoded(stdin=f"{PACK}\n{ATTESTATION}{end}") == decoded(PACK, ATTESTATION)


def test_all_vectors_at_once() -> None:
    vectors = [vector for vector in VECTORS if vector.get("signing_version", 2) == 2]
    answers = decoded(stdin="".join(vector["hex"] + "\n" for vector in vectors))
    assert len(answers) == len(vectors) > 100
    for vector, answer in zip(vectors, answers, strict=True):
        if vector.get("error"):
            assert list(answer) == ["error"]
        else:
            assert answer == {"ballots": []} | {name: vector[name] for name in FACTS if name in vector}


@pytest.mark.parametrize("form", ["0x{}", "0X{}", '"{}"', "'{}'", "  {}\t", '"0x{}"'])
def test_what_may_stand_around(form: str) -> None:
    assert decoded(form.format(ATTESTATION)) == [ANSWER]
    assert decoded(form.format(ATTESTATION.upper())) == [ANSWER]


@pytest.mark.parametrize("text", ["0g", "131", "13 ed", "tz1LggX2HUdvJ1tF4Fvv8fjsrzLeW4Jr9t2Q", "\u0663\u0663", "{}"])
def test_no_hexadecimal(text: str) -> None:
    assert decoded(text) == [{"error": "not a hexadecimal text with an even number of digits"}]


def test_a_refusal_names_offset_and_expectation() -> None:
    short, unknown, empty = decoded(ATTESTATION[:-2], "ff", "")
    assert "at offset 38: expected slot, level, round and payload hash" in short["error"]
    assert "at offset 0: expected a first byte" in unknown["error"]
    assert "can't sign empty data" in empty["error"]


def test_strict_tells_by_the_status() -> None:
    assert call("decode", "--strict", ATTESTATION).status == 0
    done = call("decode", "--strict", "ff", ATTESTATION)
    assert done.status == 1
    assert json.loads(done.out.splitlines()[1]) == ANSWER, "what follows a refused one is decoded all the same"
    assert call("decode", "--strict", stdin="zz\n").status == 1


def test_the_version_chooses_the_profile() -> None:
    assert decoded(TZ4_ATTESTATION) == decoded("--version", "2", TZ4_ATTESTATION) == [ANSWER]
    (old,) = decoded("--version", "1", TZ4_ATTESTATION)
    assert old["error"].startswith("gotez: unknown tag 41: at offset ")
    assert decoded("--version", "1", ATTESTATION) == [ANSWER]
    assert call("decode", "--version", "two", ATTESTATION).status == 1


def test_nothing_in_nothing_out() -> None:
    assert decoded() == []


def test_no_configuration_is_read() -> None:
    assert decoded("-c", "/nowhere", "--base-dir", "/nowhere", ATTESTATION) == [ANSWER]


@pytest.mark.parametrize(
    "data",
    [
        "05" + "02" * 100_000,
        "05" + "0200000005" * 100_000,
        "0502" + "7fffffff",
        "050a" + "80000000" + "00" * 8,
        "03" + "00" * 32 + "11" + "00" * 21 + "ffffffff",
    ],
    ids=["sequences", "nested", "count", "negative", "proposals"],
)
def test_hostile_shapes_are_refused_cleanly(data: str) -> None:
    answers = decoded(stdin=f"{data}\n{ATTESTATION}\n")
    assert [list(answer) for answer in answers] == [["error"], FACTS]
    assert "at offset" in answers[0]["error"]


def test_a_tree_nested_deep_is_read_or_refused_without_a_trace() -> None:
    tree = "".join(f"02{5 * inside:08x}" for inside in reversed(range(100_000)))
    (answer,) = decoded(stdin=f"05{tree}\n")
    assert answer.get("request_kind") == "pack" or "at offset" in answer["error"]


def test_a_line_that_is_too_long_is_one_refusal() -> None:
    stdin = b"00" * 3_000_000 + b"\n" + b"03\n" + b"00" * 3_000_000
    lines = [json.loads(line) for line in call("decode", stdin=stdin).out.splitlines()]
    assert ["error" in line for line in lines] == [True] * 3
    assert lines[0] == lines[2] == {"error": "the line is longer than 2097216 characters"} != lines[1]
