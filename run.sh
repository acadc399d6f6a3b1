#!/usr/bin/env bash
# ./run.sh COMMAND [key=value …]      everything of MetaPerturb from here
#
#   ./run.sh demo              what φ does, on drawn images: no download, minutes on a CPU
#   ./run.sh tgt <gpu|cpu>     train a network on a target data set, with φ or another regularizer   (Algorithm 2)
#   ./run.sh src               meta-train φ on Tiny ImageNet                                         (Algorithm 1)
#   ./run.sh pretrain <gpu>    train the target's network on Tiny ImageNet, for INIT=… ./run.sh tgt to finetune it
#   ./run.sh data <name> …     download and cache data sets: tiny_imagenet, cub, …
#   ./run.sh table1            the trainings of the paper's table 1, and the table beside the paper's; table2, table3
#   ./run.sh schedule          beyond the paper: accuracy against the length of training    (drawn by lengths)
#   ./run.sh target_size       beyond the paper: few and many images of the target          (drawn by amount)
#   ./run.sh meta_training     beyond the paper: what a good φ needs                         (drawn by effort)
#   ./run.sh networks          beyond the paper: other families; recipe: with TrivialAugment and label smoothing
#   ./run.sh tune              choose the regularizers' hyperparameters on held-out training images
#   ./run.sh select            choose the best of several φ on validation images
#   ./run.sh ship <name> [φ]   put a φ into the package, and write down what it was tested on
#   ./run.sh fig5 [run …]      convergence; fig6 robustness and calibration, fig7 scales, fig8 loss surfaces
#   ./run.sh compare [run …]   methods side by side; learning: what φ learns in meta-training; figures: all of these
#   ./run.sh phi <φ>           the 82 numbers of a φ, drawn: a file or a shipped name
#   ./run.sh docs              README, docs/, results/ and the docstrings as a site, in build/site
#   ./run.sh panel             try φ in some 130 CNNs of torchvision and timm, into results/panel.md
#   ./run.sh bench             measure how fast it is, into results/benchmark
#   ./run.sh gpu-check         try a GPU in nine minutes: sites, speed, both programs, NCCL; into results/gpu
#   ./run.sh test              the tests
#
# --slurm [partition=… gpus=…] behind src or a table submits it to Slurm (docs/cluster.md); --status says how far it is.
# --help behind a command lists its options. These settings stand before or behind a command, as in TGT_DATA=cub ./run.sh
# tgt 0 or ./run.sh tgt 0 TGT_DATA=cub; all others of a program behind it, as in ./run.sh tgt 0 image_size=64. What is
# not set has the default in configs/src.yaml, configs/tgt.yaml or configs/pretrain.yaml.
#
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")

GPUS=${GPUS:-}           # of src: 0,1,… one process each; cpu; cpu,cpu; empty: all GPUs, else the CPU
DATA=${DATA:-}           # downloads and cached arrays; empty: data, beside run.sh
RUNS=${RUNS:-$here/runs} # folder of all runs
SEED=${SEED:-}           # of src one or several: "0 1 2 3 4", one run after the other
SRC_DATA=${SRC_DATA:-}   # tiny_imagenet embedded folder
SRC_PATHS=${SRC_PATHS:-} # its zips or folders, comma-separated; empty: under DATA, else downloaded
SRC_MODEL=${SRC_MODEL:-} # network of the tasks; of several, resnet20,vgg9,…, they take turns
SRC_SPLIT=${SRC_SPLIT:-} # disjoint paired homogeneous
SRC_TASKS=${SRC_TASKS:-} # how many
SRC_STEPS=${SRC_STEPS:-} # of meta-training
SRC_RUN=${SRC_RUN:-}     # folder of the run; empty: named by its settings, in RUNS
TGT_DATA=${TGT_DATA:-}   # stl10 s_cifar100 dogs cars aircraft cub small_svhn fashion_mnist dtd folder …
TGT_PATH=${TGT_PATH:-}   # its folder or archive; empty: under DATA, else downloaded
TGT_MODEL=${TGT_MODEL:-} # conv4 conv6 vgg9 resnet20 … wrn_28_2, or any CNN of torchvision
TGT_STEPS=${TGT_STEPS:-} # of training
TGT_RUN=${TGT_RUN:-}     # folder of the run; empty: named by its settings, in RUNS
METHOD=${METHOD:-}       # base info_dropout dropblock manifold_mixup dropout mixup cutmix label_smoothing …
PHI=${PHI:-}             # file or shipped name; empty: that of src if it is there, else the shipped one
INIT=${INIT:-}           # to finetune: run of pretrain, or file of weights, to begin with
PRE_RUN=${PRE_RUN:-}     # folder of the run of pretrain, which trains TGT_MODEL on SRC_DATA
VENV=${VENV:-$here/.venv} # where the packages are; none: those of PYTHON as they are
PYTHON=${PYTHON:-}       # which Python; empty: the first of a supported version

declare -A names=( # of each program: its key=VARIABLE; what is set is passed on, and errors name the variable
    [src]="gpus=GPUS data_root=DATA seed=SEED source=SRC_DATA source_paths=SRC_PATHS model=SRC_MODEL split=SRC_SPLIT
        tasks=SRC_TASKS steps=SRC_STEPS run_dir=SRC_RUN"
    [tgt]="data_root=DATA seed=SEED target=TGT_DATA target_path=TGT_PATH model=TGT_MODEL steps=TGT_STEPS
        run_dir=TGT_RUN method=METHOD phi=PHI init=INIT"
    [pretrain]="data_root=DATA seed=SEED target=SRC_DATA target_path=SRC_PATHS model=TGT_MODEL run_dir=PRE_RUN"
)

die() { echo "error: $*" >&2; exit 1; }

usage() { # the head of this file, and its settings as a table
    sed -n '2,/^set -euo/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
    sed -n 's/^\([A-Z_]*\)=${[^#]*# /\1 /p' "${BASH_SOURCE[0]}" | while read -r variable text; do
        [[ ${names[src]} = *=$variable* ]] && program=src || program=tgt
        pair=$(grep -ow "[a-z_]*=$variable" <<<"${names[$program]}" || echo "=$variable")
        printf '  %-10s %-15s %s\n' "$variable" "$(value $program "$pair")" "$text"
    done
}

value() { # value PROGRAM KEY=VARIABLE: what is set, else the default in configs/PROGRAM.yaml
    local variable=${2#*=} yaml=$here/configs/$1.yaml
    [ -n "${!variable}" ] && echo "${!variable}" || sed -nE "s/^${2%%=*}: *//p" "$yaml" |
        sed -E "s/( +#.*| +)$//; s/^[\"'[](.*)[]\"']$/\1/; s/^null$//"
}

data_name() { # data_name NAME PATHS: the name; of image folders and archives theirs, as metaperturb.identity has them
    [[ $1 = folder && -n $2 ]] || { echo "$1" && return; }
    tr , '\n' <<<"$2" | while read -r path; do
        basename -- "$(realpath -- "$path" 2>/dev/null || echo "$path")"
    done | sed -E 's/\.(zip|tar|tar\.gz|tgz)$//' | paste -sd, | sed 's/^/folder-/'
}

src_run() { # the folder of SEED's meta-training
    local of
    of=$(value src source=SRC_DATA)-$(value src model=SRC_MODEL | tr , +)-$(value src split=SRC_SPLIT)
    echo "${SRC_RUN:-$RUNS/src-$of-seed$(value src seed=SEED)}"
}

pass_on() { # pass_on [KEY=VALUE …]: sets options to what is set for $command, and to these where nothing else is
    local pair variable
    options=()
    for pair in "$@"; do
        grep -q "^${pair%%=*}:" "$here/configs/$command.yaml" || options+=("$pair")
    done
    for pair in ${names[$command]}; do
        variable=${pair#*=}
        [ -z "${!variable}" ] || options+=("${pair%%=*}=${!variable}")
    done
}

find_python() { # the first Python of a supported version
    local candidates=(python3.12 python3.11 python3 python3.13) candidate
    [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && command -v "$candidate" && return
    done
    die "needs Python 3.11 or later (looked for: ${candidates[*]}; PYTHON=/path/to/python names one)"
}

setup() { # setup [REQUIREMENTS]: sets $py to a Python with the packages of requirements.txt and of this file, which it installs
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
        base=$(find_python)
        "$base" -m venv --clear "$VENV" || die "$base cannot make virtual environments (on Debian: apt install python3-venv)"
    fi
    local file sum sums=() missing=() quiet=--quiet
    for file in requirements.txt "$@"; do
        sum="$file $(cksum <"$here/$file")"
        sums+=("$sum")
        grep -qxF "$sum" "$VENV/.installed" 2>/dev/null || missing+=(-r "$here/$file")
    done
    if [ ${#missing[@]} -gt 0 ]; then
        [ -w "$VENV" ] || die "$VENV is another user's and lacks packages; let them run this command, or $own"
        echo "installing into $VENV (PyTorch is large: some minutes)" >&2
        if compgen -G "$VENV/lib/python3*/site-packages/torch-*+*.dist-info" >/dev/null; then
            # Somebody put a PyTorch for another CUDA there (2.12.0+cu126), which stays.
            grep -vE '^torch(vision)?=' "$here/requirements.txt" >"$VENV/.requirements"
            missing=("${missing[@]/#"$here/requirements.txt"/$VENV/.requirements}")
        fi
        [ ! -t 2 ] || quiet="" # on a terminal pip shows how far it is
        "$py" -m pip install $quiet --disable-pip-version-check "${missing[@]}" >&2 ||
            die "pip could not install the packages (network?); the same command tries again"
        printf '%s\n' "${sums[@]}" >"$VENV/.installed"
    fi
    exec 9>&-
}

script() { setup; exec "$py" "$here/scripts/$1" "${@:2}"; } # script NAME ARGUMENTS…

command=${1:-help}
[ $# -eq 0 ] || shift
[ -z "${names[$command]:-}" ] || export METAPERTURB_NAMES=${names[$command]} # messages then say TGT_PATH for target_path
typed=() slurm=""
for text in "$@"; do
    key=${text%%=*}
    [ "$text" != --slurm ] || slurm=1
    if [[ $text =~ ^[A-Z_]+= ]] && grep -q "^$key=\${" "${BASH_SOURCE[0]}"; then
        printf -v "$key" %s "${text#*=}"
    else
        typed+=("$text")
    fi
    for pair in ${names[$command]:-}; do # the program gets it as it is; the names of folders follow it, too
        [[ $text = "$key="* && $pair = "$key="* && $slurm$key != 1gpus ]] || continue # --slurm gpus=8: of a node
        printf -v "${pair#*=}" %s "${text#*=}"
        METAPERTURB_NAMES=${METAPERTURB_NAMES/$pair/}
    done
done
set -- "${typed[@]}"
data=${DATA:-$here/data}

case $command in
src)
    setup
    read -ra seeds <<<"$(value src seed=SEED)"
    [[ ${#seeds[@]} -le 1 || -z $SRC_RUN ]] || die "SRC_RUN names one run, SEED asks for ${#seeds[@]}"
    program=(-m metaperturb.meta_train)
    [[ " $* " != *" --slurm "* && " $* " != *" --status "* ]] || program=("$here/scripts/make_tables.py" src)
    for SEED in "${seeds[@]:-}"; do
        pass_on "data_root=$data" "run_dir=$(src_run)"
        run=("$py" "${program[@]}" --config "$here/configs/src.yaml" --set "${options[@]}" "$@")
        [ "$SEED" != "${seeds[*]: -1}" ] || exec "${run[@]}"
        METAPERTURB_PARENT=$$ "${run[@]}" # it ends when this script is gone
    done
    ;;
tgt | pretrain)
    [[ ${1:-=} != *=* ]] || die "usage: ./run.sh $command <gpu number or cpu> [key=value …] (--help: the keys)"
    [[ $1 = -* ]] || set -- "gpu=$1" "${@:2}"
    setup
    more=() model=$(value "$command" model=TGT_MODEL) seed=$(value "$command" seed=SEED)
    if [ "$command" = pretrain ]; then
        run=pretrain-$(value pretrain target=SRC_DATA)-$model-seed$seed
        [ "$SRC_DATA" != embedded ] || { SRC_DATA=embedded_source more=(eval_split=holdout); } # it has no test images
    else
        method=$(value tgt method=METHOD) init=$(value tgt init=INIT)
        run=tgt-$(data_name "$(value tgt target=TGT_DATA)" "$(value tgt target_path=TGT_PATH)")
        run+=-$model-$method-seed$seed${init:+-ft}
        phi=$(SEED=$seed src_run)/phi.pt
        if [ "$method" != metaperturb ]; then
            PHI=""
        elif [[ $1 != -* && -z $(value tgt phi=PHI) ]]; then
            shipped=tiny_imagenet_resnet20 said="φ: $phi, of ./run.sh src (PHI=… names another)"
            [ -e "$phi" ] || { said="φ: the shipped one, $shipped (./run.sh src makes $phi)" phi=$shipped; }
            more=("phi=$phi")
            echo "$said" >&2
        fi
    fi
    pass_on "data_root=$data" "run_dir=$RUNS/$run" "${more[@]}"
    exec "$py" -m metaperturb.meta_test --config "$here/configs/$command.yaml" --set "${options[@]}" "$@"
    ;;
demo) script demo.py --out "$RUNS/demo" "$@" ;;
data) script prepare_data.py --data-root "$data" "$@" ;;
panel) script ../results/panel.py "$@" ;;
bench) script benchmark.py "$@" ;;
gpu-check)
    setup tests/requirements.txt
    exec "$py" "$here/scripts/gpu_check.py" "$@"
    ;;
ship) script make_tables.py ship "$@" ;;
tune | select) script make_tables.py "$command" --runs "$RUNS" --data-root "$data" "$@" ;;
table1 | table2 | table3 | schedule | networks | recipe | target_size | meta_training)
    given=(--runs "$RUNS" --data-root "$data" ${PHI:+--use "phi=$PHI"})
    script make_tables.py table "$here/configs/$command.yaml" "${given[@]}" "$@"
    ;;
fig[5-8] | compare | lengths | amount | effort | learning | phi | figures)
    script figures.py "$command" --runs "$RUNS" "$@"
    ;;
docs)
    setup
    "$py" -c "import material, mkdocs, mkdocstrings" 2>/dev/null ||
        die "docs needs MkDocs and its theme: $py -m pip install --editable '$here[docs]'"
    NO_MKDOCS_2_WARNING=1 "$py" -m mkdocs build --quiet --config-file "$here/mkdocs.yml" "$@"
    echo "$here/build/site/index.html"
    ;;
test)
    setup tests/requirements.txt
    cd "$here"
    PYTHONPATH=src exec "$py" -m pytest "$@"
    ;;
help | -h | --help) usage ;;
*)
    echo "./run.sh help lists the commands and settings" >&2
    die "unknown command '$command'"
    ;;
esac
