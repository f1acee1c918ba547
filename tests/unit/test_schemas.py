"""The schemas of the host's configuration agree with its parsers, and with the examples in the documentation."""

from __future__ import annotations

import json
import re
import textwrap
import tomllib
from pathlib import Path
from typing import Any

import pytest
from certifier import ED25519, P256, public_pem, trust_text
from jsonschema import Draft202012Validator

from swtpm_prop import host_config
from swtpm_prop.errors import HostError, TrustError
from swtpm_prop.limits import ISSUER_KEYS, URI_CHARS
from swtpm_prop.trust import issuers

HERE = Path(__file__).parents[2]
TABLES = {"trust": ("[[issuer]]", "[[floor]]"), "host": ("[store]",)}
"""What begins an example of each file."""
BLOCK = re.compile(r"(?:^[ ]{4,}.*\n|^[ ]*\n)+", re.MULTILINE)


def definition(name: str) -> Any:
    return json.loads((HERE / f"schemas/{name}.schema.json").read_text())


def schema(name: str) -> Draft202012Validator:
    Draft202012Validator.check_schema(definition(name))
    return Draft202012Validator(definition(name))


def examples(name: str) -> list[str]:
    """Indented blocks of the documentation that begin with the file's table."""
    texts = (path.read_text() for path in (HERE / "README.md", *sorted((HERE / "docs").glob("*.md"))))
    blocks = (textwrap.dedent(block).strip() + "\n" for text in texts for block in BLOCK.findall(text))
    return [block for block in blocks if block.startswith(TABLES[name])]


def accepted(name: str, text: str, directory: Path) -> bool:
    """By the parser that the product uses."""
    file = directory / f"{name}.toml"
    file.write_text(text)
    try:
        (issuers if name == "trust" else host_config).load(file)
    except (TrustError, HostError) as error:
        assert error.id in ("trust.file", "trust.uri", "host.config")
        return False
    return True


@pytest.mark.parametrize("name", TABLES)
def test_the_examples_in_the_documentation_are_good(name: str, tmp_path: Path) -> None:
    assert examples(name)
    for text in examples(name):
        document = tomllib.loads(text)
        schema(name).validate(document)
        for number, entry in enumerate(key for issuer in document.get("issuer", []) for key in issuer["keys"]):
            (tmp_path / entry).write_text(public_pem((P256, ED25519)[number % 2]))
        assert accepted(name, text, tmp_path)


FLOOR = '[[floor]]\ncomponent = "linux"\nbelow = "1:6.1.153-1"\n'
GOOD = trust_text(ED25519, P256, threshold=2)


@pytest.mark.parametrize(
    ("name", "text", "good"),
    [
        ("trust", "", True),
        ("trust", GOOD, True),
        ("trust", GOOD.replace("threshold = 2", ""), True),
        ("trust", GOOD + "treshold = 2", False),
        ("trust", GOOD.replace("threshold = 2", "threshold = 0"), False),
        ("trust", GOOD.replace("threshold = 2", "threshold = true"), False),
        ("trust", GOOD.replace("threshold = 2", f"threshold = {ISSUER_KEYS + 1}"), False),
        ("trust", GOOD.replace("https:", "Https:"), False),
        ("trust", trust_text(prefix="https://example.org/" + "a" * URI_CHARS), False),
        ("trust", trust_text(ED25519, ED25519), False),
        *(("trust", FLOOR + line, True) for line in ("", 'properties = ["https://example.org/p"]')),
        *(("trust", FLOOR + line, False) for line in ("properties = []", "properties = 1", "property = 'x:y'")),
        *(("trust", FLOOR.replace("1:6.1.153-1", bad), False) for bad in ("", "-1", "1:", "6.1-", "a:1", "6_1")),
        *(("trust", FLOOR.replace("linux", bad), False) for bad in ("", "l" * 257)),
        *(("trust", text, False) for text in ("[floor]", "[[floor]]", "[[floor]]\ncomponent = 'linux'")),
        *(("trust", text, False) for text in ("issuer = 1", "issuer = [1]", "[[issuers]]", "[[issuer]]")),
        *(("host", text, True) for text in ("", "[store]", '[store]\nstale = "refuse"\nurl = "/srv/store"')),
        *(("host", text, False) for text in ("store = 1", "[[store]]", "[stor]", '[store]\nstal = "warn"')),
        ("host", '[tpm]\npcrs = "0-7,14"\ntcti = "swtpm"\n[custody]\nrecovery = ["r.pem"]', True),
        ("host", '[agent]\nlisten = "a:1"\nendpoint = ""\npeers = ["b:2", "[::1]:3"]\nmetrics = "[::1]:4"', True),
        ("host", '[agent]\nmetrics = "localhost:4"', True),
        ("host", '[agent]\nmetrics = "127.0.0.1:4"', True),
        ("host", '[agent]\nmetrics = "0.0.0.0:4"', False),
        *(("host", f"[tpm]\n{line}", False) for line in ('pcrs = ""', 'pcrs = "1-"', "tcti = ''", "event_log = 'a'")),
        *(("host", f"[agent]\n{line}", False) for line in ("listen = ''", "peers = ['']", "peers = 'a:1'", "port = 1")),
        *(("host", f"[custody]\nrecovery = {value}", False) for value in ("''", "[1]", "['']")),
        *(("host", f"[store]\n{line}", False) for line in ('stale = "no"', "stale = true", "url = 1", "stale = []")),
    ],
)
def test_a_schema_says_what_the_parser_says(name: str, text: str, good: bool, tmp_path: Path) -> None:
    assert schema(name).is_valid(tomllib.loads(text)) is accepted(name, text, tmp_path) is good


def test_the_limits_are_those_of_the_product() -> None:
    shapes = definition("trust")["$defs"]
    issuer = shapes["issuer"]["properties"]
    assert issuer["keys"]["maxItems"] == issuer["threshold"]["maximum"] == ISSUER_KEYS
    assert shapes["uri"]["maxLength"] == URI_CHARS
