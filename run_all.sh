#!/usr/bin/env bash
# Teacher, experts, sets and evaluation in one go. After an interruption give the same command again: it goes on.
#
#   bash run_all.sh [digits]           no download, three minutes on two CPU cores
#   bash run_all.sh cifar10            the paper's setting; also cifar100, tinyimagenet
#   bash run_all.sh imagefolder DIR    your images in DIR/{train,test}/CLASS/*
#   bash run_all.sh images DIR         your images without labels, at any depth of DIR; DOWNSTREAM names the judges
#   bash run_all.sh table1 [PRESET]    of the paper, table1 ... table7, appendix_b, figure1, or its rows on a preset
#   ... rehearse                       at the end of any of them: all steps, tiny, in a minute or two
#
# Variables, with their defaults (digits: simclr, 0.05, ten seeds):
#   FRACTION=0.02  SSL=barlow_twins  DISTILL_SEEDS="0"  SEEDS="0 1 2" (of the evaluation)
#   SETS="none ..."   rows: none, full, subset_INIT[_auto], krr_st_INIT, mkdt_INIT[_ITERS], mkdt_raised_INIT[_ITERS],
#                     best_INIT[_ITERS] (INIT: random, high_loss, sas), with :krr_st, :simclr or :barlow_twins behind
#   DOWNSTREAM="..."  data sets of the probe (default: the paper's seven; digits and imagefolder: themselves); a
#                     name with a space in it in quotes: "'imagefolder:a b' cifar10"
#   TEACHER EXPERTS DISTILL KRR_ST EVALUATE: further options of a stage; STUDENT: of all but the teacher
#   IMAGE_SIZE  PROCESSES=1 (by torchrun, one a GPU)  DATA_DIR=data  OUT=runs  PYTHON=python  DRY_RUN=1
set -euf -o pipefail && unset CDPATH # f: a * in a variable is no file name
refuse() { echo "error: $*; bash run_all.sh --help says more" >&2; exit 2; }
[ -f train_teacher.py ] || refuse "there is no train_teacher.py here: start run_all.sh in its own folder"
case ${1:-} in -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' run_all.sh; exit ;; esac
table= preset= folder= rehearse= failed=0 child=
case ${1:-} in table[1-7] | appendix_b | figure1) table=$1; shift ;; esac
case ${1:-} in
  digits | cifar10 | cifar100 | tinyimagenet) preset=$1; shift ;;
  imagefolder | images)
    [ -d "${2:-}" ] || [ "${DRY_RUN:-}${2:+x}" = 1x ] || refuse "$1 '${2:-}': there is no such folder"
    preset=$1 folder=${2%/} folder=${folder:-/}; [ ! -d "$folder" ] || folder=$(cd "$folder" && pwd); shift 2 ;;
esac
if [ "${1:-}" = rehearse ]; then rehearse=_rehearsal preset=${preset:-digits}; shift; fi
[ $# = 0 ] || refuse "'$1' is not understood"
for name in SETS SEEDS DISTILL_SEEDS DOWNSTREAM; do [[ ${!name-} = *[![:space:]]* ]] || unset $name; done # blank: the default
OUT=${OUT:-runs} DISTILL_SEEDS=${DISTILL_SEEDS:-0}
[[ "$DISTILL_SEEDS ${SEEDS:-0}" =~ ^([0-9]{1,9}(\ +|$))+$ ]] || refuse "DISTILL_SEEDS and SEEDS: give whole numbers"
[[ ${FRACTION:-1} =~ ^(1(\.0*)?|0?\.0*[1-9][0-9]*)$ ]] || refuse "FRACTION=$FRACTION: give a number up to 1, such as 0.02"
case ${PROCESSES:-1} in *[!0-9]* | 0*) refuse "PROCESSES=$PROCESSES: give a whole number from 1" ;; esac
init="(random|high_loss|sas)" how="(:(kd|krr_st|simclr|barlow_twins|SSL))?"
known="^(none|full|(subset|krr_st)_$init|subset_${init}_auto|(mkdt|mkdt_raised|best)_$init(_[1-9][0-9]{0,8})?)$how$"
for row in ${SETS:-}; do # a set of one's own must be there
  [[ $row =~ $known || $row =~ ^[^:]*$how$ && -n $(set +f; ls -d "$OUT"/*/sets/"${row%%:*}.pt" 2> /dev/null) ]] ||
    refuse "SETS: '$row' is unknown"
done
judged=()
while read -r name; do # of DOWNSTREAM
  if [[ $name = imagefolder:* ]]; then [ -d "${name#*:}" ] || [ -n "${DRY_RUN:-}" ]
  else [ "$name" != images ] && grep -qF " \"$name\": Dataset(" common.py; fi || refuse "DOWNSTREAM: '$name': is not there"
  judged+=("$name")
done < <([ -z "${DOWNSTREAM:-}" ] || xargs -n 1 printf '%s\n' <<< "$DOWNSTREAM" 2>&1)
only="fraction|init|seed|name|method|dataset|data_dir|out_dir|image_size|limit|width|depth" # all rows or none
[[ ! " ${DISTILL:-} ${KRR_ST:-} " =~ [[:space:]]--($only)[[:space:]=] ]] ||
  refuse "DISTILL and KRR_ST: --${BASH_REMATCH[1]} would make some rows unlike others; use FRACTION, SETS, STUDENT ..."
[[ ! " ${TEACHER:-} ${EXPERTS:-} ${EVALUATE:-} ${STUDENT:-} " =~ [[:space:]]--(dataset|data_dir|out_dir)[[:space:]=] ]] ||
  refuse "TEACHER, EXPERTS, EVALUATE, STUDENT: instead of --${BASH_REMATCH[1]} give a preset, DATA_DIR or OUT"
[ -n "${DRY_RUN:-}" ] || command -v "${PYTHON:-python}" > /dev/null || refuse "PYTHON=${PYTHON:-python}: not found"
[ "$preset" != images ] || [ -n "${DOWNSTREAM:-}" ] || [ "$table" = figure1 ] ||
  refuse "images have no labels: name the labelled sets that judge, DOWNSTREAM='imagefolder:DIR2 cifar10'"

# ---- a table: its data sets, rows and protocols ----------------------------------------------------------------
presets=cifar100 default_ssl=barlow_twins default_fraction=0.02 labels="0.01 0.05" protocols=linear
three="cifar10 cifar100 tinyimagenet"
few="none subset_random subset_sas subset_high_loss mkdt_random mkdt_high_loss full subset_random_auto"
rows="$few subset_high_loss_auto krr_st_random subset_random:SSL subset_random:krr_st krr_st_random:krr_st mkdt_random:krr_st"
case $table in
  '') presets=digits rows="$few best_random" ;;
  table1) presets=cifar10 ;;
  table3) presets=tinyimagenet ;;
  table4) presets=$three default_fraction=0.05 rows="none subset_random mkdt_high_loss full" ;;
  table5) default_fraction=0.05 labels=0.05 protocols="resnet10 resnet18" rows="none subset_random mkdt_high_loss_1000" ;;
  table6) presets="cifar10 cifar100" default_ssl=simclr rows="none subset_random subset_random:SSL mkdt_high_loss" ;;
  table7) presets=$three labels="0.1 0.5" rows="none subset_random subset_sas krr_st_random mkdt_high_loss full" ;;
  appendix_b) protocols="finetune_krr_st finetune finetune_slow"
    rows="none subset_random subset_random:SSL krr_st_random krr_st_random:krr_st mkdt_high_loss" ;;
esac

# ---- a preset: the scripts' defaults are the paper's for 2 % of CIFAR-10; of repeated options the last one counts ----
options() {
  local dataset=$1 threads= seeds="0 1 2"; teacher= student= experts= match= paper= krr_st= evaluate= sets=$rows
  raised="--iters 100 --syn_steps 20 --batch_syn 128 --lr_img 3e4 --lr_lr 0.01 --clip_grad 0.003"
  ours="--iters 100 --syn_steps 20 --batch_syn 128 --lr_img 1e4 --lr_lr 0.05 --clip_grad 0.003 --decay 0.1"
  ours+=" --inner_momentum 0.9 --log_lr --lr_init auto"
  ssl=${SSL:-$default_ssl} fraction=$(LC_ALL=C printf %g "${FRACTION:-$default_fraction}") # .050 is 0.05
  base=$OUT/$(basename "${folder:-$1}") # the teacher's folder; it serves all sizes of sets
  case $1 in
    digits) # chosen on held-out training images (evaluate.py --split val); small tensors are fastest on one thread
      ssl=${SSL:-simclr} seeds="0 1 2 3 4 5 6 7 8 9" labels=${labels/0.01 0.05/0.02 0.1}
      threads="--threads 1" student="--width 16" evaluate="--batch_size 32"
      case $fraction-${FRACTION:-} in 0.02-) fraction=0.05 ;; 0.05-) fraction=0.125 ;; esac
      teacher="--width 16 --epochs 40 --batch_size 128 --lr 0.003 --min_crop 0.4"
      experts="--num_experts 10 --epochs 5 --batch_size 32" match="--expert_epochs 2 --max_start_epoch 4"
      paper="--iters 150 --syn_steps 20 --batch_syn 32 --lr_img 200 --lr_lr 2e-3"
      raised+=" --iters 150 --batch_syn 32" ours+=" --iters 150 --batch_syn 32" krr_st="--iters 1000 --lr_img 0.01 --batch_real 256"
      if [ -n "$table" ]; then base+=_plain; else teacher+=" --target_dim 64" sets+=" krr_st_random"; fi ;;
    image*) dataset=$1:$folder; [ $1 = imagefolder ] || sets=${sets/subset_sas /} ;; # SAS counts the classes
    tinyimagenet) teacher="--bt_lambda 0.0009765625 --min_crop 0.2" paper="--syn_steps 10 --lr_img 1e5" krr_st="--lr_img 1e-5" ;;
    cifar*) case $fraction in 0.0[5-9]* | 0.[1-9]* | 1) # the paper's options for 5 %
      experts="--epochs 6" match="--max_start_epoch 5" paper="--lr_img 1e4" ;; esac ;;
  esac
  case $1-$ssl in digits-simclr | [!d]*-barlow_twins) ;; *) base+=_$ssl ;; esac
  base+=$rehearse out=$base
  case $1-$fraction in digits-0.05 | [!d]*-0.02) ;; *) out+=_$fraction ;; esac
  if [ -n "$rehearse" ]; then
    seeds="0 1" labels="0.1 0.5" student+=" --limit 500 --width 16" match+=" --syn_steps 3" fraction=${FRACTION:-0.1}
    teacher+=" --limit 500 --width 8 --epochs 1 --batch_size 16" experts+=" --num_experts 2 --batch_size 32"
    krr_st+=" --pool_steps 9 --batch_real 32" evaluate+=" --epochs 2 --krr_st_epochs 4 --finetune_steps 3"
  fi
  sets=${SETS:-$sets} sets=${sets//:SSL/:$ssl} student+=" ${STUDENT:-}" teacher="--ssl $ssl $teacher ${TEACHER:-}"
  data=(--dataset "$dataset" --data_dir "${DATA_DIR:-data}" $threads ${IMAGE_SIZE:+--image_size $IMAGE_SIZE})
  judges=("$dataset"); case $1$rehearse in cifar10 | cifar100 | tinyimagenet) judges=($three aircraft cub2011 dogs flowers) ;; esac
  [ ${#judged[@]} = 0 ] || judges=("${judged[@]}")
  evaluate+=" --sets $sets --seeds ${SEEDS:-$seeds}"
}

# ---- the stages ------------------------------------------------------------------------------------------------
# A signal to this script is the stage's, too, which then writes its checkpoint.
stopped() { [ -z "$child" ] || { kill -TERM "$child" 2> /dev/null && wait "$child"; } || true; exit "$1"; }
trap 'stopped 143' TERM; trap 'stopped 130' INT

run() { # a stage; the paper matches one expert an iteration, so distill.py has one process here
  local launch=("${PYTHON:-python}") status=0
  [[ ${PROCESSES:-1} = 1 || $1 = distill.py || $1 = results/* ]] ||
    launch+=(-m torch.distributed.run --standalone --nproc_per_node "$PROCESSES")
  echo "+$(printf ' %q' "${launch[@]}" "$@")"
  [ -z "${DRY_RUN:-}" ] || return 0
  "${launch[@]}" "$@" & # not in front: bash would not hear of a signal
  child=$!; wait $child || status=$?; child=
  [ $status = 0 ] || failed=$status
  [ $status -lt 128 ] || exit $status # killed
  return $status
}

bring_targets() { # from $base into the folder $1, unless it has others
  [ -n "${DRY_RUN:-}" ] || [ "$1" = "$base" ] || cmp -s "$base/targets.pt" "$1/targets.pt" ||
    { [ ! -e "$1/targets.pt" ] && mkdir -p "$1" && cp "$base/targets.pt" "$1/.tmp" && mv "$1/.tmp" "$1/targets.pt"; } ||
    refuse "$1/targets.pt: is not that of $base; move it away, or choose another OUT"
}

make_set() { # $1: its row, of which the first words choose the options; $2: its seed
  local row=$1 seed=$((10#$2)) words=$paper iters=""
  [[ $row =~ $known && $row =~ _$init ]] || return 0 # none, full, one's own
  local init=${BASH_REMATCH[1]}
  [ "$row" != subset_high_loss ] || seed=0 # that depends on none
  [[ ! $row =~ _([0-9]+)$ ]] || iters=${BASH_REMATCH[1]}; [ -z "$rehearse" ] || iters=3
  case $row in mkdt_raised_*) words=$raised ;; best_*) words=$ours ;; subset_*) iters="0 --lr_init 0.1" ;; esac
  [[ $row != *_auto ]] || iters="0 --lr_init auto"
  words+=" $match ${DISTILL:-}"
  [[ $row != krr_st_* ]] || words="--method krr_st $krr_st ${KRR_ST:-}"
  [ $seed = 0 ] || row+=_seed$seed
  # One that fails is "not run" in the table; but no table is made of a set that was made with other options.
  run distill.py "${data[@]}" --out_dir "$out" $student --fraction "$fraction" --init "$init" --seed $seed \
    --name "$row" $words ${iters:+--iters $iters} || [ ! -e "$out/sets/$row.pt" ] || exit 2
}

figure1() { # appendix A.2: five experts with one start for each objective, and a set that matches the first of them
  local curve dir words steps runs=() epochs=20 batch=256 ssl_batch=1024 size=0.01 iters=100
  case $preset in digits) batch=32 ssl_batch=128 size=0.05 ;; image*) batch=64 ssl_batch=256 epochs=10 ;; esac
  [ -z "$rehearse" ] || epochs=4 ssl_batch=100 iters=3
  for curve in kd supervised $ssl ${ssl}_4x_batch; do
    dir=$out/figure1/$curve words="--batch_size $ssl_batch" steps="--syn_steps 10"
    case $curve in # alpha_syn starts where 100 iterations brought most; Barlow Twins' would run away
      kd) words="--batch_size $batch" steps="--syn_steps 20 --lr_init 1"; bring_targets "$dir" || continue ;;
      supervised) words="--batch_size $batch" steps="--syn_steps 20 --expert_epochs 4 --lr_init 0.01" ;;
      *_4x_batch) words="--batch_size $((4 * ssl_batch))" ;;
    esac
    [[ $curve != barlow_twins* ]] || steps+=" --lr_init 1e-4 --lr_lr 0"
    run train_experts.py "${data[@]}" --out_dir "$dir" $student --objective ${curve%_4x_batch} --same_init \
      --num_experts 5 --epochs $epochs $words ${EXPERTS:-} || continue
    run distill.py "${data[@]}" --out_dir "$dir" $student --fraction "${FRACTION:-$size}" --init random \
      --max_experts 1 --max_start_epoch 1 --iters $iters --lr_img 1000 $steps ${DISTILL:-} || continue
    runs+=("$dir")
  done
  run results/figure1.py --out_dir "$OUT" --name "figure1_$(basename "$out")" "${runs[@]}" || true
}

judge() { # the tables of this preset
  local protocol name words
  for protocol in $protocols; do
    name=${table:-results}_$protocol name=${name%_linear} words="--fractions $labels"
    case $protocol in resnet*) words+=" --arch $protocol" ;; finetune*) words="--protocol $protocol" ;; esac
    [[ $table != table* ]] || words+=" --paper $table"
    [ -z "$ready" ] || run evaluate.py "${data[@]}" --out_dir "$out" --name $name $student $evaluate $words ${EVALUATE:-} \
      --downstream "${judges[@]}" || true
    [ -z "$table" ] || [ ! -f "$out/$name.md" ] ||
      tables+="## $(basename "$out"): $name"$'\n\n'"$(< "$out/$name.md")"$'\n\n'
  done
}

name=${folder:+$(basename "$folder")} name=${name:-$preset} tables=
result=$OUT/$table${name:+_$name}$rehearse.md # a table of the paper, of all presets
for preset in ${preset:-$presets}; do
  options $preset
  run train_teacher.py "${data[@]}" --out_dir "$base" $teacher && bring_targets "$out" && ready=1 || ready=
  if [ "$table" = figure1 ]; then [ -z "$ready" ] || figure1; continue; fi
  [ -z "$ready" ] || run train_experts.py "${data[@]}" --out_dir "$out" $student $experts ${EXPERTS:-} || ready=
  for row in $(printf '%s\n' ${ready:+$sets} | sed 's/:.*//' | awk '!seen[$0]++'); do # each once
    for seed in $DISTILL_SEEDS; do make_set "$row" "$seed"; done; done
  judge # of a preset that failed, the tables of before
done
[ -z "$tables" -o -n "${DRY_RUN:-}" ] || { printf %s "$tables" > "$result.tmp" && mv "$result.tmp" "$result" && echo "wrote $result"; } || failed=2
exit $failed
