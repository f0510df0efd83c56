#!/usr/bin/env bash
# Kills and resumes a run on the demo model at random, and compares what it leaves with the undisturbed run's.
#   tools/soak.sh [SECONDS=3600] [SEED=1]
# Prints kills, largest resident memory and most file descriptors of any process; fails when adapters differ,
# when memory or descriptors grow, or when a run cannot go on. BUPO names the program to use.
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${1:-3600} RANDOM=${2:-1}
bupo=${BUPO:-target/release/bupo-gguf}
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
options=(--steps 12 --internal-steps 5 --prompts-per-step 4 --group 4 --eval-problems 4 --rank 4 --kv-mib 16
    --checkpoint-every 1 --threads 1)
"$bupo" train demo "${options[@]}" --out "$dir/whole" >/dev/null 2>&1
rounds=0 kills=0 rss_first=0 rss_most=0 fd_first=0 fd_most=0
while ((SECONDS < seconds)); do
    rounds=$((rounds + 1))
    rm -rf "$dir/cut"
    command=(train demo "${options[@]}" --out "$dir/cut")
    while true; do
        "$bupo" "${command[@]}" >/dev/null 2>"$dir/said" &
        pid=$!
        # 0.05 to 4 s, then a look at the process, then the kill.
        sleep "$((RANDOM % 4)).$(printf %02d $((RANDOM % 95 + 5)))"
        rss=$(awk '/^VmRSS/ {print $2}' "/proc/$pid/status" 2>/dev/null || true)
        fds=$(ls "/proc/$pid/fd" 2>/dev/null | wc -l || true)
        ((rss_first == 0 && rounds > 1)) && rss_first=$rss_most fd_first=$fd_most
        ((${rss:-0} > rss_most)) && rss_most=$rss
        ((${fds:-0} > fd_most)) && fd_most=$fds
        signal=$((RANDOM % 3 == 0 ? 15 : 9))
        kill "-$signal" "$pid" 2>/dev/null && kills=$((kills + 1))
        code=0
        wait "$pid" 2>/dev/null || code=$?
        ((code == 0)) && break
        if ((code != 130 && code != 137 && code != 143)); then
            echo "exit code $code: $(tail -1 "$dir/said")" >&2
            exit 1
        fi
        # Killed before config.toml stood, there is nothing to go on from.
        [[ -e $dir/cut/config.toml ]] && command=(train --resume "$dir/cut")
    done
    cmp "$dir/whole/adapter.gguf" "$dir/cut/adapter.gguf"
    cmp "$dir/whole/checkpoints/step-12/state.safetensors" "$dir/cut/checkpoints/step-12/state.safetensors"
    cmp "$dir/whole/completions.jsonl" "$dir/cut/completions.jsonl"
done
echo "rounds $rounds, kills $kills, adapters identical; largest RSS $rss_most kB (first round $rss_first kB)," \
    "most descriptors $fd_most (first round $fd_first), bytes lost 0"
if ((rss_first > 0 && rss_most > rss_first * 5 / 4)) || ((fd_first > 0 && fd_most > fd_first + 8)); then
    echo "memory or descriptors grew" >&2
    exit 1
fi
