#!/usr/bin/env bash
# Teacher, experts, distillation and evaluation in one go.
#
#   bash run_all.sh                       digits: no download, a few minutes on two CPU cores
#   bash run_all.sh cifar10               the paper's setting; also: cifar100, tinyimagenet
#   bash run_all.sh imagefolder DIR       your images in DIR/{train,test}/CLASS/*
#   bash run_all.sh PRESET rehearse       the same stages, shrunk to minutes on a CPU
#
# Variables: FRACTION (0.02; 0.05 sets the paper's 5 % options), OUT (runs/PRESET), DATA_DIR (data), DOWNSTREAM (data sets
# of the probe), SSL (barlow_twins, simclr), IMAGE_SIZE (of an imagefolder, 32), SEEDS, DRY_RUN=1 (print the commands only).
# What is finished is not done again: after an interruption, give the same command once more.
set -euo pipefail

preset=${1:-digits}
case $preset in
  digits | cifar10 | cifar100 | tinyimagenet) dataset=$preset; shift || true ;;
  imagefolder)
    [ $# -ge 2 ] || { echo "error: imagefolder needs a folder: bash run_all.sh imagefolder DIR" >&2; exit 2; }
    dataset=imagefolder:${2%/}; shift 2 ;;
  *) echo "error: preset '$preset' is unknown: choose digits, cifar10, cifar100, tinyimagenet or imagefolder DIR" >&2; exit 2 ;;
esac
rehearse=
case "$*" in
  "") ;;
  rehearse) rehearse=1 ;;
  *) echo "error: '$*' is not understood: after the preset, only the word rehearse" >&2; exit 2 ;;
esac

fraction=${FRACTION:-0.02}
out=${OUT:-runs/$(basename "${dataset#*:}")${rehearse:+_rehearsal}$([ "$fraction" = 0.02 ] || echo "_$fraction")}
data=(--dataset "$dataset" --data_dir "${DATA_DIR:-data}" --out_dir "$out")
[ -z "${IMAGE_SIZE:-}" ] || data+=(--image_size "$IMAGE_SIZE")

# Options of each stage; the scripts' own defaults are the paper's CIFAR-10 2 % setting.
student=() teacher=(--ssl "${SSL:-barlow_twins}") experts=() distill=(--fraction "$fraction") evaluate=()
seven="cifar10 cifar100 tinyimagenet aircraft cub2011 dogs flowers"
five_percent=$(awk "BEGIN { print ($fraction >= 0.05) }")
case $preset in
  digits) ;;
  cifar10 | cifar100)
    evaluate=(--downstream ${DOWNSTREAM:-$seven})
    if [ "$five_percent" = 1 ]; then
      distill+=(--max_start_epoch 5 --lr_img 1e4) experts=(--epochs 6)
    fi ;;
  tinyimagenet)
    evaluate=(--downstream ${DOWNSTREAM:-$seven})
    teacher+=(--bt_lambda 0.0009765625) distill+=(--syn_steps 10 --lr_img 1e5) ;;
  imagefolder)
    evaluate=(--downstream ${DOWNSTREAM:-$dataset}) ;;
esac
