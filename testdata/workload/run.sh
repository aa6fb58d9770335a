#!/bin/sh
# Runs in the guest: counts the words of every text below this directory and
# writes them to results/.
cd "$(dirname "$0")" || exit 1
for f in src/*.txt; do
	wc -w <"$f" >"results/$(basename "$f" .txt).words"
done
