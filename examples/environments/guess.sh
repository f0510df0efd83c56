#!/bin/sh
# A guessing game of several turns, as an environment program: bupo-gguf train MODEL --env "cmd:sh guess.sh" --data task:guess
# Needs sed alone. The number is the problem's answer; it is kept in a shell variable for each dialogue, with the bounds that
# the answers so far give it. A guess beyond them, and a turn without a number, cost as much as they do in env:guess.

wasted=-0.1
far=999999999999999999

text() { printf '%s' "$line" | sed -n "s/.*\"$1\":\"\([^\"]*\)\".*/\1/p"; }
# The last whole number in a text, without leading zeros.
number() { sed -n 's/[^0-9]*$//; s/.*[^0-9-]//; s/^\(-\{0,1\}\)0*\([0-9]\)/\1\2/; /^-\{0,1\}[0-9][0-9]*$/p'; }

while IFS= read -r line; do
    # A dialogue's name is letters, digits, - and . : as part of a variable's name the last two become _.
    name=$(text dialogue | tr -c 'A-Za-z0-9\n' '_')
    case $line in
    *'"op":"reset"'*)
        eval "number_$name=$(text answer) above_$name=-$far below_$name=$far"
        echo '{"messages": [{"role": "user", "content": "Guess my number, 0 to 99. I say higher or lower."}]}'
        ;;
    *'"op":"step"'*)
        eval "wanted=\$number_$name above=\$above_$name below=\$below_$name"
        guess=$(text content | number)
        case $line in *'"truncated":true'*) guess= ;; esac # what was cut off may be the beginning of a number
        case $line in *'"last":true'*) last=true ;; *) last=false ;; esac
        reward=$wasted
        if [ -z "$guess" ]; then
            word="I see no number"
        elif [ "$guess" -eq "$wanted" ]; then
            echo '{"reward": 1, "done": true, "success": true}'
            continue
        else
            if [ "$guess" -gt "$above" ] && [ "$guess" -lt "$below" ]; then reward=0; fi
            if [ "$guess" -lt "$wanted" ]; then
                word=higher
                if [ "$guess" -gt "$above" ]; then eval "above_$name=$guess"; fi
            else
                word=lower
                if [ "$guess" -lt "$below" ]; then eval "below_$name=$guess"; fi
            fi
        fi
        echo "{\"messages\": [{\"role\": \"user\", \"content\": \"$word\"}], \"reward\": $reward, \"done\": $last, \"success\": false}"
        ;;
    *'"op":"close"'*)
        unset "number_$name" "above_$name" "below_$name"
        echo '{}'
        ;;
    esac
done
