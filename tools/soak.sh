#!/usr/bin/env bash
# Trains the demo model undisturbed, then again with kills and resumes at random, and compares what both leave.
#   tools/soak.sh [SECONDS=3600] [SEED=1]
# Each phase runs undisturbed for a quarter of the time, and as many steps again with kills. Fails when one byte
# differs, when memory or descriptors of the undisturbed process grow, when any killed one takes more than it, when
# a run cannot go on, or when something is left in the folder for temporary files. BUPO names the program to use.
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${1:-3600} RANDOM=${2:-1}
bupo=$(realpath "${BUPO:-target/release/bupo-gguf}")
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
mkdir "$dir/tmp"
export TMPDIR=$dir/tmp
options=(--prompts-per-step 8 --group 4 --max-response 12 --eval-problems 4 --rank 4 --lr 1e-5 --kv-mib 16
    --checkpoint-every 1 --threads 1)

# Resident kB now, at most, and open files, of a process that may have ended.
look() {
    local now most files
    now=$(awk '/^VmRSS/ {print $2}' "/proc/$1/status" 2>/dev/null || true)
    most=$(awk '/^VmHWM/ {print $2}' "/proc/$1/status" 2>/dev/null || true)
    files=$(ls "/proc/$1/fd" 2>/dev/null | wc -l || true)
    echo "${now:-0} ${most:-0} ${files:-0}"
}

# The largest of a column within two fractions of a file's lines.
most() { # FILE COLUMN FROM TO
    awk -v c="$2" -v from="$3" -v to="$4" '{v[NR] = $c} END {m = 0; for (i = int(NR * from) + 1; i <= NR * to; i++) if (v[i] > m) m = v[i]; print m}' "$1"
}

fail() {
    echo "soak: $*" >&2
    exit 1
}

for phase in internal final; do
    [[ $phase == internal ]] && inner=1000000000 || inner=2
    whole=$dir/$phase-whole cut=$dir/$phase-cut seen=$dir/$phase-seen
    begun=$SECONDS
    "$bupo" train demo "${options[@]}" --internal-steps $inner --steps 1000000000 --out "$whole" \
        >/dev/null 2>"$dir/said" &
    pid=$!
    while ((SECONDS - begun < seconds / 4)); do
        sleep 0.5
        kill -0 $pid 2>/dev/null || fail "the undisturbed run ended: $(tail -1 "$dir/said")"
        look $pid >>"$seen"
    done
    kill -TERM $pid
    wait $pid || [[ $? == 130 ]] || fail "the undisturbed run: $(tail -1 "$dir/said")"
    steps=$(ls "$whole/checkpoints" | sed 's/step-//' | sort -n | tail -1)
    early=$(most "$seen" 1 0.1 0.4) late=$(most "$seen" 1 0.7 1) peak=$(most "$seen" 2 0 1)
    files_early=$(most "$seen" 3 0.1 0.4) files_late=$(most "$seen" 3 0.7 1)
    took=$((SECONDS - begun))
    # A life is up to six steps long, in hundredths of a second.
    life=$((600 * took / steps + 5))
    echo "$phase phase: $steps steps in $took s undisturbed; resident $early kB early, $late kB late;" \
        "descriptors $files_early early, $files_late late"
    # It is steady once batches of every shape were seen; half a percent and 256 kB are the allocator's to keep.
    ((steps < 200 || late * 1000 <= early * 1005 + 256000)) || fail "memory grew"
    ((files_late <= files_early + 1)) || fail "descriptors grew"

    begun=$SECONDS kills=0 terms=0 cut_peak=0 cut_files=0
    command=(train demo "${options[@]}" --internal-steps $inner --steps "$steps" --out "$cut")
    while true; do
        "$bupo" "${command[@]}" >/dev/null 2>"$dir/said" &
        pid=$!
        ended=$((RANDOM % life + 1))
        sleep "$((ended / 100)).$(printf %02d $((ended % 100)))"
        read -r _ now_peak now_files < <(look $pid)
        ((now_peak > cut_peak)) && cut_peak=$now_peak
        ((now_files > cut_files)) && cut_files=$now_files
        if ((RANDOM % 4 == 0)); then
            kill -TERM $pid 2>/dev/null && terms=$((terms + 1))
        else
            kill -KILL $pid 2>/dev/null && kills=$((kills + 1))
        fi
        code=0
        wait $pid 2>/dev/null || code=$?
        ((code == 0)) && break
        ((code == 130 || code == 137 || code == 143)) || fail "exit code $code: $(tail -1 "$dir/said")"
        # Killed before config.toml stood, there is nothing to go on from.
        [[ -e $cut/config.toml ]] && command=(train --resume "$cut")
    done
    for file in adapter.gguf completions.jsonl "checkpoints/step-$steps/state.safetensors"; do
        cmp "$whole/$file" "$cut/$file"
    done
    echo "$phase phase: $kills SIGKILL and $terms SIGTERM in $((SECONDS - begun)) s; adapter, moments and completions" \
        "identical, bytes lost 0; resident at most $cut_peak kB (undisturbed $peak kB), descriptors $cut_files"
    ((steps < 200 || cut_peak * 5 <= peak * 6)) || fail "a killed run took more memory"
    ((cut_files <= files_late + 4)) || fail "a killed run held more descriptors"
done
left=$(ls -A "$TMPDIR" | wc -l)
echo "$SECONDS s in all; files left in the temporary folder: $left"
((left == 0)) || fail "something is left in the temporary folder: $(ls -A "$TMPDIR" | head -3)"
