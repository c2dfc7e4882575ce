"""Decides from a distribution's metadata whether its source may enter the corpus.

Knows SPDX expressions, trove classifiers and the free-text `License` field, in that order of trust. Knows nothing
of files: a permissive distribution may still hold a file under other terms, which `corpus` looks for itself.
"""

from __future__ import annotations

import re
from email.message import Message
from importlib.metadata import PackageMetadata

PERMISSIVE_SPDX = frozenset(
    name.lower()
    for name in (
        "0BSD", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0", "CNRI-Python", "HPND", "ISC",
        "MIT", "MIT-0", "MIT-CMU", "PSF-2.0", "Python-2.0", "Python-2.0.1", "Unlicense", "Zlib",
    )
)  # fmt: skip
PERMISSIVE_EXCEPTIONS = frozenset({"llvm-exception"})

PERMISSIVE_CLASSIFIERS = {
    "Apache Software License": "Apache-2.0",
    "BSD License": "BSD",
    "CC0 1.0 Universal (CC0 1.0) Public Domain Dedication": "CC0-1.0",
    "Historical Permission Notice and Disclaimer (HPND)": "HPND",
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "MIT No Attribution License (MIT-0)": "MIT-0",
    "Public Domain": "public domain",
    "Python Software Foundation License": "PSF",
    "The Unlicense (Unlicense)": "Unlicense",
    "zlib/libpng License": "Zlib",
}

# The whole field must match: "MIT" is a licence, "MIT and GPL" is not one of these.
_FREE_TEXT = (
    (r"(the )?mit( license)?( \(mit\))?", "MIT"),
    (r"(the )?(new |modified |revised |simplified )?(\d-clause )?bsd([ -]\d[ -]clause)?( license)?", "BSD"),
    (r"(the )?apache(( software)? license)?,?( |-)?(version )?(v?2(\.0)?)?( license)?", "Apache-2.0"),
    (r"isc( license)?( \(iscl\))?", "ISC"),
    (r"(psf|python software foundation)([ -]?2\.0)?( license)?", "PSF"),
    (r"(the )?unlicense", "Unlicense"),
    (r"zlib( license)?", "Zlib"),
    (r"public domain", "public domain"),
)


def permissive_expression(expression: str) -> bool:
    """Whether an SPDX expression can be met with permissive licences alone.

    Every operand of AND must be permissive and at least one of OR. Unknown identifiers and malformed expressions
    are refused.
    """
    tokens = re.findall(r"[()]|[A-Za-z0-9.+:-]+", expression)
    position = 0

    def peek() -> str:
        return tokens[position].upper() if position < len(tokens) else ""

    def take() -> str:
        nonlocal position
        position += 1
        return tokens[position - 1] if position <= len(tokens) else ""

    def simple() -> bool:
        if peek() == "(":
            take()
            inside = either()
            return take() == ")" and inside
        allowed = take().lower() in PERMISSIVE_SPDX
        if peek() == "WITH":
            take()
            allowed = take().lower() in PERMISSIVE_EXCEPTIONS and allowed
        return allowed

    def both() -> bool:
        allowed = simple()
        while peek() == "AND":
            take()
            allowed = simple() and allowed
        return allowed

    def either() -> bool:
        allowed = both()
        while peek() == "OR":
            take()
            allowed = both() or allowed
        return allowed

    return either() and position == len(tokens)


def permissive_licence(metadata: PackageMetadata | Message) -> str | None:
    """The licence under which a distribution may be used here, or None if it may not.

    `License-Expression` decides when present (PEP 639); else every informative classifier must be permissive; else
    the `License` field must be one that this module recognises, by name or by the words of the text itself.
    """
    fields = {
        name: [str(value) for value in metadata.get_all(name) or []]
        for name in ("License-Expression", "License", "Classifier")
    }
    if fields["License-Expression"]:
        expression = fields["License-Expression"][0]
        return expression if permissive_expression(expression) else None
    text = fields["License"][0].strip() if fields["License"] else ""
    brief = len(text) <= 80 and "\n" not in text
    if brief and re.search(r"\b(a|l)?gpl|\bmpl|mozilla|proprietary|nvidia|non-?commercial", text, re.IGNORECASE):
        return None
    classified = [line.split("::")[-1].strip() for line in fields["Classifier"] if line.startswith("License ::")]
    classified = [name for name in classified if name != "OSI Approved"]
    if classified:
        if not all(name in PERMISSIVE_CLASSIFIERS for name in classified):
            return None
        return " AND ".join(sorted({PERMISSIVE_CLASSIFIERS[name] for name in classified}))
    if brief and text:
        for pattern, name in _FREE_TEXT:
            if re.fullmatch(pattern, text, re.IGNORECASE):
                return name
        return text if permissive_expression(text) else None
    if re.search(r"GNU (Lesser |Affero )?General Public|Mozilla Public|proprietary", text, re.IGNORECASE):
        return None
    if "Permission is hereby granted, free of charge" in text:
        return "MIT"
    if "Redistribution and use in source and binary forms" in text:
        return "BSD"
    if "Apache License" in text and "Version 2.0" in text:
        return "Apache-2.0"
    return None


def stated_licence(metadata: PackageMetadata | Message) -> str:
    """What a distribution says of its licence, whether or not it may be used: an expression, or its first words."""
    for name in ("License-Expression", "License"):
        for value in metadata.get_all(name) or []:
            return str(value).strip()
    return ""
