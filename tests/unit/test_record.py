"""Lines of the property log: put together from parts, equal to what json makes of the whole."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from swtpm_prop.tpm.algorithms import ALGORITHMS, Digest
from swtpm_prop.translate import record
from swtpm_prop.translate.record import Record
from swtpm_prop.translate.verdict import Verdict

TIME = "2026-01-01T00:00:00Z"

digests = st.lists(
    st.sampled_from(ALGORITHMS).flatmap(
        lambda a: st.binary(min_size=a.size, max_size=a.size).map(lambda value: Digest(a, value))
    ),
    max_size=4,
).map(tuple)
verdicts = st.builds(Verdict, st.booleans(), st.lists(st.text(), max_size=2).map(tuple), st.text(), st.text())
states = st.dictionaries(st.text(), st.dictionaries(st.integers(0, 23), st.text()))

records = st.one_of(
    st.builds(record.measurement, st.text(), st.integers(0, 23), digests, st.text(), st.text(), verdicts),
    st.builds(record.snapshot, st.text(), states),
    st.builds(record.failure, st.text(), st.text()),
)


@given(records, st.integers(0))
def test_a_line_is_the_json_of_its_record(entry: Record, recnum: int) -> None:
    assert entry.to_line(recnum, TIME) == json.dumps(entry.to_json(recnum, TIME), separators=(",", ":"))
