#!/usr/bin/env bash
# in_parallel.sh FOREGROUND BACKGROUND: run two commands at the same time, and fail if one of them fails.
# The output of the second one is shown after the first one has ended.
set -uo pipefail
log=$(mktemp)
bash -c "$2" >"$log" 2>&1 &
background=$!
trap 'kill "$background" 2>/dev/null; rm -f "$log"' EXIT
bash -c "$1"
first=$?
wait "$background"
second=$?
cat "$log"
((first == 0 && second == 0))
