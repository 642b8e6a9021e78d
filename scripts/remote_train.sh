#!/usr/bin/env bash
# Set up and start a training run on a rented machine, over ssh, and leave it running there.
#
#   scripts/remote_train.sh [options] HOST -- PRETRAIN FLAGS
#   scripts/remote_train.sh gpu-box -- --config configs/medium.yaml --upload s3://bucket/run
#
#   --port N        ssh port                              --identity FILE  ssh key
#   --folder DIR    where on the machine (default skylar) --data DIR       copy this data folder, too
#   --processes N   (default: one per GPU)                --cpu            a machine without a GPU
#   --python PATH   an interpreter there that has everything: installs nothing
#
# HOST is what `ssh` takes (user@name, or a name of ~/.ssh/config). Every step says what it does
# and stops at the first failure; calling again goes on: files that are there are not copied anew,
# a run that is going on is left alone, one that has ended or died is resumed.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() { echo "remote_train: $*" >&2; exit 2; }

folder=skylar port='' identity='' data='' processes='' cpu='' python=''
while [ $# -gt 0 ]; do
    case $1 in
        --folder) folder=${2:?--folder needs a value}; shift ;;
        --port) port=${2:?--port needs a value}; shift ;;
        --identity) identity=${2:?--identity needs a value}; shift ;;
        --data) data=${2:?--data needs a value}; shift ;;
        --processes) processes=${2:?--processes needs a value}; shift ;;
        --python) python=${2:?--python needs a value}; shift ;;
        --cpu) cpu=1 ;;
        --help) sed -n '2,16s/^# \?//p' "$0"; exit 0 ;;
        --) break ;;
        -*) fail "unknown option $1; --help lists them" ;;
        *) [ -z "${host:-}" ] || fail "two hosts, $host and $1; flags of the run come after --"
           host=$1 ;;
    esac
    shift
done
[ -n "${host:-}" ] || fail "no host; give one, as in: scripts/remote_train.sh HOST -- --config configs/test.yaml"
[ "${1:-}" = -- ] && [ $# -gt 1 ] || fail "no flags of the run; give them after --, as in: -- --config configs/test.yaml"
shift
case $folder in *[!A-Za-z0-9_./-]*|-*) fail "folder=$folder: use letters, digits, and _ . / -" ;; esac
[[ ${processes:-1} =~ ^[1-9][0-9]*$ ]] || fail "processes=$processes is not a whole number of at least 1"
[ -z "$data" ] || [ -f "$data/train/manifest.json" ] ||
    fail "$data/train/manifest.json is missing: not a folder that \`skylar data tokenize\` made"
for flag in "$@"; do case $flag in --resume|--resume=*) fail "leave --resume out: a run that exists is resumed" ;; esac; done

ssh_options=(-o BatchMode=yes -o ConnectTimeout=15 -o ServerAliveInterval=15)
[ -z "$port" ] || ssh_options+=(-p "$port")
[ -z "$identity" ] || ssh_options+=(-i "$identity" -o IdentitiesOnly=yes)
# a command for the other machine's shell, every word of it quoted
remote() { local line; printf -v line '%q ' "$@"; ssh "${ssh_options[@]}" -- "$host" "$line"; }

echo "1. $host: reaching it"
remote true || fail "$host cannot be reached by ssh without a password; try: ssh ${ssh_options[*]} $host"

echo "2. $host: looking at it"
if [ -z "$cpu" ]; then
    gpus=$(remote nvidia-smi --query-gpu=name,memory.total --format=csv,noheader) ||
        fail "$host has no NVIDIA GPU that works (nvidia-smi fails); --cpu trains without one"
    echo "$gpus" | sed 's/^/   /'
    processes=${processes:-$(echo "$gpus" | wc -l)}
fi
processes=${processes:-1}
remote "${python:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "${python:-python3} on $host is missing or older than Python 3.11; name another with --python"
free=$(remote df -Pk . | awk 'NR == 2 {print int($4 / 1024 / 1024)}')
echo "   $free GiB free"
[ "$free" -ge 2 ] || fail "$host has $free GiB free; it needs at least 2, and room for checkpoints"

echo "3. copying the package to $host:$folder"
remote mkdir -p "$folder"
git ls-files -z -- . ':!nbs' ':!docs' | tar --null -cz --files-from=- --ignore-failed-read |
    remote tar -xz -C "$folder"
if [ -n "$data" ]; then
    echo "   and the data in $data"
    there=$(remote sh -c 'cat "$1" 2>/dev/null | cksum' sh "$folder/data/train/manifest.json")
    [ "$there" = "$(cksum < "$data/train/manifest.json")" ] ||
        tar -c -C "$data" . | remote sh -c 'mkdir -p "$1" && tar -x -C "$1"' sh "$folder/data"
    set -- "$@" --data data
fi

if [ -z "$python" ]; then
    echo "4. installing (a torch that is there already is taken)"
    script='cd "$1" && { test -x .venv/bin/python || python3 -m venv --system-site-packages .venv; } && '
    script+='.venv/bin/pip install -q --disable-pip-version-check -e ".[remote]"'
    remote sh -c "$script" sh "$folder" ||
        fail "installing on $host failed; its lines above say why"
    python=.venv/bin/python
else
    echo "4. taking $python as it is"
fi

echo "5. checking the run's settings there"
remote sh -c 'cd "$1" && shift && PYTHONPATH=. "$@" >/dev/null' sh "$folder" \
    "$python" -m skylar pretrain "$@" --print_config ||
    fail "the settings are refused; the line above says why"

echo "6. starting"
# flock: one run at a time; setsid and nohup: it lives on when the connection ends. One line, for
# a line break is quoted in a way that only bash understands
script='cd "$1" && shift || exit 1; if ! flock -n remote_train.lock true; then echo running; exit; fi; '
script+='PYTHONPATH=. nohup setsid flock -nF remote_train.lock "$@" >>remote_train.log 2>&1 </dev/null & '
script+='echo $! >remote_train.pid; echo started'
started=$(remote sh -c "$script" sh "$folder" \
    "$python" -m torch.distributed.run --nproc-per-node "$processes" --max-restarts 3 \
    --rdzv-backend c10d --rdzv-endpoint localhost:0 -m skylar pretrain "$@" --resume)
if [ "$started" = running ]; then
    echo "   a run is going on there already: left alone"
else
    sleep 5
    if remote flock -n "$folder/remote_train.lock" true; then
        echo "   it has ended already; its last lines:"
        remote tail -n 5 "$folder/remote_train.log" | sed 's/^/   /'
    fi
fi

at="ssh${port:+ -p $port}${identity:+ -i $identity} $host"
cat <<END
7. it trains; this connection may end.
   follow   $at tail -f $folder/remote_train.log
   stop     $at 'kill -TERM \$(cat $folder/remote_train.pid)'    (it saves a checkpoint first)
   go on    the same command again
END
