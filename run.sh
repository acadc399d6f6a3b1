#!/usr/bin/env bash
# MetaPerturb: everything from here.
#
#   ./run.sh demo              meta-train φ and use it, on drawn images: no download, minutes on a CPU
#   ./run.sh test              the tests
#   ./run.sh src               meta-train φ on Tiny ImageNet           (Algorithm 1)
#   ./run.sh tgt <gpu|cpu>     train a network on a target data set     (Algorithm 2)
#   ./run.sh pretrain <gpu>    train the target's network on Tiny ImageNet, for INIT=… ./run.sh tgt to finetune it
#   ./run.sh table1            all trainings of the paper's table 1, and the table beside the paper's; also table2,
#                              table3 (--preset smoke|quick|paper, --jobs, --rows, …: see --help)
#   ./run.sh schedule          beyond the paper: accuracy against the length of training (lengths draws it); networks:
#                              other families; recipe: with TrivialAugment and label smoothing; target_size: few and many
#                              images (amount draws it); meta_training: what φ needs (effort draws it)
#   ./run.sh tune              choose the regularizers' hyperparameters on held-out training images
#   ./run.sh select            choose the best of several φ on validation images
#   ./run.sh ship <name> [φ]   put a φ into the package, and write down what it was tested on
#   ./run.sh fig5 [run …]      convergence; fig6 robustness and calibration, fig7 scales, fig8 loss surfaces,
#                              compare: methods side by side, learning: what φ learns in meta-training, figures: all
#   ./run.sh phi <φ>           the 82 numbers of a φ, drawn: a file or a shipped name
#   ./run.sh docs              README, docs/, results/ and the docstrings as a site, in build/site
#   ./run.sh data <name> …     download and cache data sets             (tiny_imagenet, cub, …)
#   ./run.sh panel             try φ in some 120 CNNs of torchvision and timm, into results/panel.md
#   ./run.sh bench             measure how fast it is, into results/benchmark (--help: which parts, --json, --smoke)
#
# Each creates .venv and installs requirements.txt first, where that has not been done (PYTHON=… names the Python to use;
# VENV=none takes its packages as they are). Settings follow; override them from the environment, and any other setting
# by a key=value behind the command:   TGT_DATA=cub ./run.sh tgt 0 steps=2000
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")

GPUS=${GPUS:-auto}                  # devices for src: 0,1,… one process each; cpu; cpu,cpu; auto
DATA=${DATA:-$here/data}            # downloads and cached arrays
RUNS=${RUNS:-$here/runs}            # results
SEED=${SEED:-0}                     # for src one or several: "0 1 2 3 4", one run after the other

SRC_DATA=${SRC_DATA:-tiny_imagenet} # or embedded, folder
SRC_PATHS=${SRC_PATHS:-}            # local zips or folders, comma-separated; empty: under DATA, else downloaded
SRC_MODEL=${SRC_MODEL:-resnet20}
SRC_SPLIT=${SRC_SPLIT:-disjoint}    # or paired, homogeneous
SRC_TASKS=${SRC_TASKS:-10}
SRC_STEPS=${SRC_STEPS:-750}
src_run() { echo "${SRC_RUN:-$RUNS/src-$SRC_DATA-$SRC_MODEL-$SRC_SPLIT-seed$1}"; } # the run of one seed

TGT_DATA=${TGT_DATA:-s_cifar100}    # stl10 dogs cars aircraft cub small_svhn fashion_mnist dtd tiny_imagenet folder …
TGT_PATH=${TGT_PATH:-}              # folder or archive of the target; empty: under DATA, else downloaded
TGT_MODEL=${TGT_MODEL:-resnet20}    # conv4 conv6 vgg9 resnet20 … wrn_28_2, or any CNN of torchvision
TGT_STEPS=${TGT_STEPS:-10000}
METHOD=${METHOD:-metaperturb}       # base info_dropout dropblock manifold_mixup dropout mixup cutmix
                                    # label_smoothing trivial_augment; adversarial: training on attacks
PHI=${PHI:-}                        # φ to use, a file or shipped name; empty: tgt takes that of src if it is there, else
SHIPPED_PHI=tiny_imagenet_resnet20  # this one, and tables make theirs
INIT=${INIT:-}                      # finetuning: run of pretrain, or file of weights, to begin with
target=$TGT_DATA
[[ $TGT_DATA != folder || -z $TGT_PATH ]] || target=folder-$(basename "$TGT_PATH" | sed 's/\..*//')
TGT_RUN=${TGT_RUN:-$RUNS/tgt-$target-$TGT_MODEL-$METHOD-seed$SEED${INIT:+-ft}}
PRE_RUN=${PRE_RUN:-$RUNS/pretrain-$SRC_DATA-$TGT_MODEL-seed$SEED} # pretrain: TGT_MODEL on SRC_DATA

VENV=${VENV:-$here/.venv}

die() { echo "error: $*" >&2; exit 1; }

usage() { # the head of this file and the settings below it
    sed -n '2,/^set -euo/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
    sed -n '/^GPUS=/,/^VENV=/{/^src_run/!s/^\([A-Z_]*\)=${[A-Z_]*:-\(.*\)}/  \1=\2/p;s/^SHIPPED_PHI/  &/p;/^ *#/p}' "${BASH_SOURCE[0]}"
}

find_python() { # the first Python of a supported version
    local candidates=(python3.12 python3.11 python3 python3.13) candidate
    [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    die "needs Python 3.11 or later (looked for: ${candidates[*]}; PYTHON=/path/to/python names one)"
}

setup() { # setup REQUIREMENTS…: sets $py to a Python with the packages of these files, installing those that are missing
    export PYTHONPATH="$here/src${PYTHONPATH:+:$PYTHONPATH}"
    if [ "$VENV" = none ]; then
        py=$(find_python)
        [[ $py = /* ]] || py=$PWD/$py
        return
    fi
    local own="VENV=/a/folder/of/yours ./run.sh … installs there"
    mkdir -p "$VENV" 2>/dev/null || die "$VENV cannot be made; $own"
    py=$(cd "$VENV" >/dev/null && pwd)/bin/python
    if { exec 9>"$VENV/.lock"; } 2>/dev/null; then # two commands started at once install one after the other
        flock 9 2>/dev/null || true
    fi # else it is another user's, and used as it is
    if ! "$py" -m pip --version >/dev/null 2>&1; then
        [ -w "$VENV" ] || die "$VENV is another user's and its Python does not run; $own"
        local base
        base=$(find_python)
        "$base" -m venv --clear "$VENV" || die "$base cannot make virtual environments (on Debian: apt install python3-venv)"
    fi
    local file sum sums=() missing=()
    for file in "$@"; do
        sum="${file#"$here"/} $(cksum <"$file")"
        sums+=("$sum")
        grep -qxF "$sum" "$VENV/.installed" 2>/dev/null || missing+=(-r "$file")
    done
    if [ ${#missing[@]} -gt 0 ]; then
        [ -w "$VENV" ] || die "$VENV is another user's and lacks packages; let them run this command, or $own"
        echo "installing into $VENV (PyTorch is large: some minutes)" >&2
        "$py" -m pip install --quiet --disable-pip-version-check "${missing[@]}" ||
            die "pip could not install the packages (network?); the same command tries again"
        printf '%s\n' "${sums[@]}" >"$VENV/.installed"
    fi
    exec 9>&-
}

browser() { # for the site's test; without one it is skipped
    local name
    for name in chromium chromium-browser google-chrome; do ! command -v "$name" >/dev/null || return 0; done
    [ "$VENV" != none ] && [ ! -e "$VENV/.browser" ] || return 0
    touch "$VENV/.browser" # asked for once
    timeout 120 "$py" -m playwright install chromium-headless-shell >/dev/null 2>&1 ||
        echo "no Chromium, and none could be fetched: the site is not tested in a browser" >&2
}

command=${1:-}
[ $# -gt 0 ] && shift
case $command in
demo)
    setup "$here/requirements.txt"
    exec "$py" "$here/scripts/demo.py" --out "$RUNS/demo" "$@"
    ;;
test)
    setup "$here/requirements.txt" "$here/tests/requirements.txt"
    browser
    cd "$here"
    PYTHONPATH=src exec "$py" -m pytest "$@"
    ;;
panel)
    setup "$here/requirements.txt"
    exec "$py" "$here/scripts/panel.py" "$@"
    ;;
bench)
    setup "$here/requirements.txt"
    exec "$py" "$here/scripts/benchmark.py" "$@"
    ;;
src)
    setup "$here/requirements.txt"
    read -ra seeds <<<"$SEED"
    [ ${#seeds[@]} -eq 1 ] || [ -z "${SRC_RUN:-}" ] || die "SRC_RUN names one run, SEED asks for ${#seeds[@]}"
    for seed in "${seeds[@]}"; do
        run=("$py" -m metaperturb.meta_train --config "$here/configs/src.yaml" --set "gpus=$GPUS" "data_root=$DATA"
            "seed=$seed" "source=$SRC_DATA" "source_paths=$SRC_PATHS" "model=$SRC_MODEL" "split=$SRC_SPLIT"
            "tasks=$SRC_TASKS" "steps=$SRC_STEPS" "run_dir=$(src_run "$seed")" "$@")
        [ "$seed" != "${seeds[-1]}" ] || exec "${run[@]}"
        METAPERTURB_PARENT=$$ "${run[@]}" # it ends when this script is gone
    done
    ;;
tgt)
    [[ ${1:--} != -* ]] || die "usage: ./run.sh tgt <gpu number or cpu> [key=value …] (tgt cpu --help: the keys)"
    gpu=$1 && shift
    setup "$here/requirements.txt"
    options=("gpu=$gpu" "data_root=$DATA" "seed=$SEED" "target=$TGT_DATA" "model=$TGT_MODEL" "steps=$TGT_STEPS"
        "method=$METHOD" "run_dir=$TGT_RUN")
    [ -n "$TGT_PATH" ] && options+=("target_path=$TGT_PATH")
    if [ "$METHOD" = metaperturb ]; then
        phi=${PHI:-$(src_run "$SEED")/phi.pt}
        if [ -z "$PHI" ] && [ ! -e "$phi" ]; then
            echo "$phi is not there (./run.sh src makes it): taking the shipped φ, $SHIPPED_PHI" >&2
            phi=$SHIPPED_PHI
        elif [ -z "$PHI" ]; then
            echo "taking the φ of ./run.sh src, $phi (PHI=… names another)" >&2
        fi
        options+=("phi=$phi")
    fi
    [ -z "$INIT" ] || options+=("init=$INIT")
    exec "$py" -m metaperturb.meta_test --config "$here/configs/tgt.yaml" --set "${options[@]}" "$@"
    ;;
pretrain)
    [[ ${1:--} != -* ]] || die "usage: ./run.sh pretrain <gpu number or cpu> [key=value …] (tgt cpu --help: the keys)"
    gpu=$1 && shift
    setup "$here/requirements.txt"
    options=("gpu=$gpu" "data_root=$DATA" "seed=$SEED" "model=$TGT_MODEL" "run_dir=$PRE_RUN")
    case $SRC_DATA in
    embedded) options+=("target=embedded_source" "eval_split=holdout") ;; # it has no test images
    *) options+=("target=$SRC_DATA") ;;
    esac
    [ -z "$SRC_PATHS" ] || options+=("target_path=$SRC_PATHS")
    exec "$py" -m metaperturb.meta_test --config "$here/configs/pretrain.yaml" --set "${options[@]}" "$@"
    ;;
table1 | table2 | table3 | schedule | networks | recipe | target_size | meta_training | tune | select)
    setup "$here/requirements.txt"
    what=("$command")
    [[ $command = tune || $command = select ]] || what=(table "$here/configs/$command.yaml")
    options=(--runs "$RUNS" --data-root "$DATA")
    [[ -z $PHI || ${what[0]} != table ]] || options+=(--use "phi=$PHI")
    exec "$py" "$here/scripts/make_tables.py" "${what[@]}" "${options[@]}" "$@"
    ;;
fig5 | fig6 | fig7 | fig8 | compare | lengths | amount | effort | learning | phi | figures)
    setup "$here/requirements.txt"
    exec "$py" "$here/scripts/figures.py" "$command" --runs "$RUNS" "$@"
    ;;
docs)
    setup "$here/requirements.txt"
    "$py" -c "import material, mkdocs, mkdocstrings" 2>/dev/null ||
        die "docs needs MkDocs and its theme: $py -m pip install --editable '$here[docs]'"
    NO_MKDOCS_2_WARNING=1 "$py" -m mkdocs build --quiet --config-file "$here/mkdocs.yml" "$@"
    echo "$here/build/site/index.html"
    ;;
ship)
    setup "$here/requirements.txt"
    exec "$py" "$here/scripts/make_tables.py" ship "$@"
    ;;
data)
    setup "$here/requirements.txt"
    exec "$py" "$here/scripts/prepare_data.py" --data-root "$DATA" "$@"
    ;;
"" | help | -h | --help) usage ;;
*)
    usage >&2
    die "unknown command '$command'"
    ;;
esac
