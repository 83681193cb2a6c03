#!/usr/bin/env bash
# Teacher, experts, distillation and evaluation in one go.
#
#   bash run_all.sh                       digits: no download, a few minutes on two CPU cores
#   bash run_all.sh cifar10               the paper's setting; also: cifar100, tinyimagenet
#   bash run_all.sh imagefolder DIR       your images in DIR/{train,test}/CLASS/*
#   bash run_all.sh PRESET rehearse       the same stages, shrunk to minutes on a CPU
#
# Variables, with their defaults:
#   FRACTION=0.02       size of the set (digits 0.05); from 0.05 on, cifar10 and cifar100 take the paper's 5 % options
#   SSL=barlow_twins    or simclr (the default of digits)
#   DOWNSTREAM="..."    data sets of the probe: the paper's seven; digits and imagefolder: themselves
#   SEEDS="0 1 2"       of the evaluation (digits: ten)
#   IMAGE_SIZE=32       of an imagefolder
#   TEACHER EXPERTS DISTILL EVALUATE    further options of a stage, for example TEACHER="--batch_size 64"
#   DATA_DIR=data  OUT=runs/PRESET  PYTHON=python
#   DRY_RUN=1           print the commands only
# What is finished is not done again: after an interruption, give the same command once more.
set -eo pipefail

usage() { echo "error: $1" >&2; exit 2; }

preset=${1:-digits}
[ $# -eq 0 ] || shift
case $preset in
  -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit ;;
  digits | cifar10 | cifar100 | tinyimagenet) dataset=$preset ;;
  imagefolder)
    [ -n "$1" ] || usage "imagefolder needs a folder: bash run_all.sh imagefolder DIR"
    dataset=imagefolder:${1%/}; shift ;;
  *) usage "preset '$preset' is unknown: choose digits, cifar10, cifar100, tinyimagenet, or imagefolder DIR" ;;
esac
[ $# -eq 0 ] || [ "$*" = rehearse ] || usage "'$*' is not understood: after the preset comes nothing, or the word rehearse"
rehearse=$1

# The options of each stage. The scripts' defaults are the paper's setting for 2 % of CIFAR-10.
ssl=barlow_twins threads=() student=() teacher=() experts=() distill=() evaluate=() seeds="0 1 2"
downstream=("$dataset") default_fraction=0.02
case $preset in
  digits) # chosen on held-out training images (evaluate.py --split val)
    ssl=simclr default_fraction=0.05 seeds="0 1 2 3 4 5 6 7 8 9"
    threads=(--threads 1) # small tensors are fastest so
    student=(--width 16)
    teacher=(--width 16 --epochs 40 --batch_size 128 --lr 0.003 --min_crop 0.4)
    experts=(--num_experts 10 --epochs 5 --batch_size 32)
    distill=(--iters 150 --syn_steps 20 --expert_epochs 2 --max_start_epoch 4 --batch_syn 32)
    distill+=(--lr_img 200 --lr_lr 2e-3)
    evaluate=(--batch_size 32 --fractions 0.02 0.1) ;;
  cifar10 | cifar100 | tinyimagenet)
    downstream=(cifar10 cifar100 tinyimagenet aircraft cub2011 dogs flowers) ;;
esac
fraction=${FRACTION:-$default_fraction} seeds=${SEEDS:-$seeds}
[[ $fraction =~ ^(0?\.[0-9]+|1)$ ]] || usage "FRACTION=$fraction is not understood: give a number above 0, at most 1"
[[ $seeds =~ ^[0-9\ ]+$ ]] || usage "SEEDS='$seeds' is not understood: give whole numbers with spaces between"
case $preset in
  tinyimagenet)
    teacher=(--bt_lambda 0.0009765625) distill=(--syn_steps 10 --lr_img 1e5) ;;
  cifar10 | cifar100)
    if awk "BEGIN { exit !($fraction >= 0.05) }"; then
      experts=(--epochs 6) distill=(--max_start_epoch 5 --lr_img 1e4)
    fi ;;
esac
if [ "$rehearse" ]; then # options given twice: the last one counts
  downstream=("$dataset") seeds=${SEEDS:-0 1}
  student+=(--limit 500 --width 16)
  teacher+=(--limit 500 --width 8 --epochs 1 --batch_size 32)
  experts+=(--num_experts 2)
  distill+=(--iters 3 --syn_steps 3)
  evaluate+=(--epochs 2 --fractions 0.1 0.5)
fi

[ -z "$DOWNSTREAM" ] || read -ra downstream <<< "$DOWNSTREAM"
read -ra seeds <<< "$seeds"

suffix=
[ "$fraction" = $default_fraction ] || suffix=_$fraction
out=${OUT:-runs/$(basename "${dataset#*:}")$suffix${rehearse:+_rehearsal}}
data=(--dataset "$dataset" --data_dir "${DATA_DIR:-data}" --out_dir "$out" "${threads[@]}")
[ -z "$IMAGE_SIZE" ] || data+=(--image_size "$IMAGE_SIZE")

run() {
  echo "+ python$(printf ' %q' "$@")"
  [ "$DRY_RUN" ] || "${PYTHON:-python}" "$@"
}

usual=${out/$suffix/}
if [ "$suffix" ] && [ -f "$usual/targets.pt" ] && [ ! -e "$out" ] && [ -z "$DRY_RUN" ]; then
  rm -rf "$out.tmp" && mkdir -p "$out.tmp" # sets of all sizes have one teacher
  cp "$usual/targets.pt" "$out.tmp" && { [ ! -f "$usual/teacher.pt" ] || cp "$usual/teacher.pt" "$out.tmp"; }
  mv "$out.tmp" "$out"
fi
run train_teacher.py "${data[@]}" --ssl "${SSL:-$ssl}" "${teacher[@]}" $TEACHER
run train_experts.py "${data[@]}" "${student[@]}" "${experts[@]}" $EXPERTS
set=("${data[@]}" "${student[@]}" --fraction "$fraction" "${distill[@]}" $DISTILL)
for init in random high_loss; do
  run distill.py "${set[@]}" --init $init --iters 0 # the plain subset
  run distill.py "${set[@]}" --init $init
done
run distill.py "${set[@]}" --init sas --iters 0
run distill.py "${set[@]}" --init random --iters 0 --lr_from mkdt_random
run evaluate.py "${data[@]}" "${student[@]}" "${evaluate[@]}" $EVALUATE \
  --downstream "${downstream[@]}" --seeds "${seeds[@]}"
