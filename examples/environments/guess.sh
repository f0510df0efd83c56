#!/bin/sh
# A guessing game of several turns, as an environment program: bupo-gguf train MODEL --env "cmd:sh guess.sh" --data task:guess
# Needs sed alone. The number is the problem's answer; it is kept in a shell variable for each dialogue.

text() { printf '%s' "$line" | sed -n "s/.*\"$1\":\"\([^\"]*\)\".*/\1/p"; }
number() { printf '%s' "$line" | sed -n "s/.*\"$1\":\([0-9][0-9]*\).*/\1/p"; }

while IFS= read -r line; do
    # A dialogue's name is letters, digits, - and . : as part of a variable's name the last two become _.
    name=$(text dialogue | tr -c 'A-Za-z0-9\n' '_')
    case $line in
    *'"op":"reset"'*)
        eval "number_$name=$(text answer)"
        echo '{"messages": [{"role": "user", "content": "Guess my number, 0 to 99. I say higher or lower."}]}'
        ;;
    *'"op":"step"'*)
        eval "wanted=\$number_$name"
        guess=$(text content | sed 's/.*[^0-9]\([0-9][0-9]*\)[^0-9]*$/\1/; s/[^0-9]//g; s/^0*\(.\)/\1/')
        case $line in *'"last":true'*) last=true ;; *) last=false ;; esac
        if [ -z "$guess" ]; then
            word="I see no number"
        elif [ "$guess" -eq "$wanted" ] 2>/dev/null; then
            echo '{"reward": 1, "done": true, "success": true}'
            continue
        elif [ "$guess" -lt "$wanted" ] 2>/dev/null; then
            word=higher
        else
            word=lower
        fi
        echo "{\"messages\": [{\"role\": \"user\", \"content\": \"$word\"}], \"done\": $last, \"success\": false}"
        ;;
    *'"op":"close"'*)
        unset "number_$name"
        echo '{}'
        ;;
    esac
done
