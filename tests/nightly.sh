#!/usr/bin/env bash
# One night, here or in .github/workflows/nightly.yml: run the suite, write the page, compare with the baseline, keep the
# night in the history. What has not changed since the last night is not computed again.
#
#     tests/nightly.sh                      # into build/nightly; exit 0, or the gate's: 1 regression, 3 run incomplete
#     SUITE=... BASELINE=... RESULTS=... HISTORY=... SITE=... tests/nightly.sh
#
# Whatever the gate says, page, summary and history are written first. SITE is then a folder to publish as it is.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

SUITE=${SUITE:-suites/nightly.toml}
BASELINE=${BASELINE:-results/baselines/nightly.json}
RESULTS=${RESULTS:-build/nightly/results}
HISTORY=${HISTORY:-build/nightly/history}
SITE=${SITE:-build/nightly/site}
EVENBITS=${EVENBITS:-evenbits}

worst=0
step() { # a step that fails does not keep the later ones from being done; the first failure is the exit code
    echo "nightly: $*"
    "$@"
    local code=$?
    if [ "$code" -ne 0 ] && [ "$worst" -eq 0 ]; then worst=$code; fi
    return "$code"
}

name=$(sed -n 's/^name *= *"\(.*\)".*/\1/p' "$SUITE" | head -n 1)
[ -n "$name" ] || { echo "nightly: $SUITE: no suite with a name" >&2; exit 2; }
summary() {
    if [ -n "${GITHUB_STEP_SUMMARY:-}" ]; then cat >>"$GITHUB_STEP_SUMMARY"; else cat >/dev/null; fi
}
plan="$RESULTS/runs/$name/plan.json"
rm -rf "$SITE" "$plan" # without its plan, what an earlier night left is not taken for this night's
mkdir -p "$SITE" "$HISTORY"

# a trial that failed is the gate's to judge: it says which are missing, and exits 3
"$EVENBITS" run "$SUITE" --results "$RESULTS" --no-report
ran=$?
if [ ! -f "$plan" ]; then
    echo "nightly: evenbits run: exit $ran, and nothing was planned: nothing is compared, published or kept" >&2
    echo "The run did not start: see the log." | summary
    if [ "$ran" -le 1 ]; then ran=3; fi
    exit "$ran"
fi
if [ "$ran" -gt 1 ]; then
    echo "nightly: evenbits run: exit $ran" >&2
    worst=$ran
fi
step "$EVENBITS" history add "$SUITE" --results "$RESULTS" --into "$HISTORY"
step "$EVENBITS" history show "$HISTORY" --out "$SITE/history"
step "$EVENBITS" report "$SUITE" --results "$RESULTS" --html --history "$HISTORY"
step "$EVENBITS" gate "$BASELINE" --suite "$SUITE" --results "$RESULTS" --markdown "$SITE/summary.md" --junit "$SITE/gate.xml"
gate=$?
step "$EVENBITS" clean --results "$RESULTS" # what this night no longer needs is not carried to the next

report="$RESULTS/runs/$name/report"
[ -d "$report" ] && cp -R "$report" "$SITE/report"
[ -f "$report/page.html" ] && cp "$report/page.html" "$SITE/index.html"
cp -R "$HISTORY" "$SITE/nights"
if [ -f "$SITE/summary.md" ]; then summary <"$SITE/summary.md"; else echo "No gate: see the log." | summary; fi
# the gate's word goes before that of a step beside it, but not before that of a run which broke
if [ "$gate" -ne 0 ] && [ "$ran" -le 1 ]; then worst=$gate; fi
if [ "$worst" -eq 0 ] && [ "$ran" -ne 0 ]; then worst=3; fi
echo "nightly: exit $worst; see $SITE"
exit "$worst"
