#!/usr/bin/env bash
# Train the base, then the three adapters side by side, then evaluate: about ten minutes on one H200.
# usage: recipes/tiny/all.sh FOLDER [STEPS] [MINUTES] [QUESTIONS]   (a tokenizer lies in kvrun/tiny)
set -euo pipefail
out=$1 steps=${2:-4500} minutes=${3:-6} questions=${4:-200}
python=${PYTHON:-python3}
mkdir -p "$out"
cp kvrun/tiny/tokenizer.json kvrun/tiny/tokenizer_config.json kvrun/tiny/chat_template.jinja "$out"
if [ -z "${ADAPTERS_ONLY:-}" ]; then
    "$python" -m recipes.tiny.train --steps "$steps" --minutes "$minutes" --shard-rows 256 --out "$out" ${BASE_OPTIONS:-}
fi
for task in sql json pirate; do
    "$python" -m recipes.tiny.train --task $task --base "$out" --out "$out/adapters/$task" \
        --rows 32 --shard-rows 64 --steps "${ADAPTER_STEPS:-600}" --minutes 1.2 --workers 5 &
done
wait
"$python" -m recipes.tiny.evaluate --folder "$out" --count "$questions" --wrong 3 --write "$out/eval.json"
