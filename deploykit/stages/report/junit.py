"""A verdict as JUnit XML, which CI systems show."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from deploykit.verdict import Reason, Verdict

# XML 1.0 cannot hold most control characters, not even escaped.
_FORBIDDEN = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def text(verdict: Verdict, name: str = "deploykit gate") -> str:
    """One test case for each comparison, one skipped case for each row that had none.

    An inconclusive comparison is an <error>: as <skipped> a CI system would show it green. A verdict without a single
    comparison is one error.
    """
    reasons = list(verdict.reasons)
    if not reasons and verdict.outcome != "pass":
        reasons = [Reason("report", "comparisons", verdict.outcome, "nothing was compared")]
    suite = ElementTree.Element("testsuite", name=_clean(name), tests=str(len(reasons) + len(verdict.skipped)))
    for attribute, outcome in (("failures", "fail"), ("errors", "inconclusive")):
        suite.set(attribute, str(sum(r.outcome == outcome for r in reasons)))
    suite.set("skipped", str(len(verdict.skipped)))
    for reason in reasons:
        case = ElementTree.SubElement(suite, "testcase", classname=_clean(reason.row), name=_clean(reason.check))
        if reason.outcome == "pass":
            ElementTree.SubElement(case, "system-out").text = _clean(reason.message)
        else:
            tag = "failure" if reason.outcome == "fail" else "error"
            ElementTree.SubElement(case, tag, type=reason.outcome, message=_clean(reason.message))
    for said in verdict.skipped:
        row, _, why = said.partition(": ")
        case = ElementTree.SubElement(suite, "testcase", classname=_clean(row), name="row")
        ElementTree.SubElement(case, "skipped", message=_clean(why or row))
    suites = ElementTree.Element("testsuites")
    suites.append(suite)
    ElementTree.indent(suites)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(suites, encoding="unicode") + "\n"


def _clean(text: str) -> str:
    return _FORBIDDEN.sub("?", text)
