#!/usr/bin/env bash
# Checks the wording of all tracked texts: misspelled, British and archaic words, and phrases that are hard to read.
set -euo pipefail
cd "$(dirname "$0")/.."
# Names (CANN, ND), accepted spellings, and deliberate mistakes in tests.
ignored=cann,nd,cancelled,writeable,temprature,libray,rigth,grop,fiel,consle,chek
unchecked='CHANGELOG\.md|LICENSE|scripts/(wordlist|phrases)\.txt|.*\.(png|svg|lock)'
git ls-files | grep -vxE "$unchecked" |
    xargs .venv/bin/codespell --builtin clear,en-GB_to_en-US -D - -D scripts/wordlist.txt --ignore-words-list "$ignored"
if git ls-files | grep -vxE "$unchecked" | xargs grep -nIEif scripts/phrases.txt; then
    echo "these phrases are hard to read: see the glossary and the rules in CONTRIBUTING.md" >&2
    exit 1
fi
