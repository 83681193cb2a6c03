#!/usr/bin/env bash
# Teacher, experts, sets and evaluation in one go. What is finished is not done again, and what was under way goes
# on from its checkpoint: after an interruption, give the same command once more.
#
#   bash run_all.sh [digits]           no download, three minutes on two CPU cores
#   bash run_all.sh cifar10            the paper's setting; also cifar100, tinyimagenet
#   bash run_all.sh imagefolder DIR    your images in DIR/{train,test}/CLASS/*
#   bash run_all.sh images DIR         your images without labels, at any depth of DIR; DOWNSTREAM names the judges
#   bash run_all.sh table1 [PRESET]    a table of the paper, table1 ... table7, appendix_b or figure1; or its rows on
#                                      digits, imagefolder DIR or images DIR
#   ... rehearse                       at the end of any of them: all steps, tiny, in a minute or two
#
# Variables, with their defaults:
#   FRACTION=0.02  SSL=barlow_twins  RECIPE=paper (best: ours)  DISTILL_SEEDS="0"  SEEDS="0 1 2" (of the evaluation)
#   SETS="none ..."   rows: none, full, subset_INIT, subset_INIT_auto (at its own lr), mkdt_INIT,
#                     mkdt_INIT_ITERS, best_INIT, krr_st_INIT (INIT: random, high_loss, sas); with :krr_st,
#                     :simclr or :barlow_twins behind
#   DOWNSTREAM="..."  data sets of the probe (default: the paper's seven; digits and imagefolder: themselves); a
#                     name with a space in it in quotes: "'imagefolder:a b' cifar10"
#   TEACHER EXPERTS DISTILL KRR_ST EVALUATE: further options of a stage; STUDENT: of all but the teacher
#   IMAGE_SIZE  PROCESSES=1 (by torchrun, one a GPU)  DATA_DIR=data  OUT=runs  PYTHON=python  DRY_RUN=1
set -euf -o pipefail # f: a * in a variable is no file name
unset CDPATH
refuse() { echo "error: $*; bash run_all.sh --help says more" >&2; exit 2; }
[ -f train_teacher.py ] || refuse "there is no train_teacher.py here: start run_all.sh in its own folder"
case ${1:-} in -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' run_all.sh; exit ;; esac

table= preset= folder= rehearse= failed=0
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
OUT=${OUT:-runs} RECIPE=${RECIPE:-paper} DISTILL_SEEDS=${DISTILL_SEEDS:-0}
case $RECIPE in paper | best) ;; *) refuse "RECIPE=$RECIPE: choose paper or best" ;; esac
[[ "$DISTILL_SEEDS ${SEEDS:-0}" =~ ^([0-9]{1,9}(\ +|$))+$ ]] || refuse "DISTILL_SEEDS and SEEDS: give whole numbers"
[[ ${FRACTION:-1} =~ ^(1|0?\.0*[1-9][0-9]*)$ ]] || refuse "FRACTION=$FRACTION: give a number up to 1, such as 0.02"
case ${PROCESSES:-1} in *[!0-9]* | 0*) refuse "PROCESSES=$PROCESSES: give a whole number from 1" ;; esac
case ${SSL:-simclr} in simclr | barlow_twins) ;; *) refuse "SSL=$SSL: choose simclr or barlow_twins" ;; esac
init="(random|high_loss|sas)" how="(:(kd|krr_st|simclr|barlow_twins|SSL))?"
known="^(none|full|subset_$init(_auto)?|(mkdt|best)_$init(_[1-9][0-9]*)?|krr_st_$init)$how$"
for row in ${SETS:-}; do # a set of one's own must be there
  [[ $row =~ $known || $row =~ ^[^:]*$how$ && -n $(set +f; ls -d "$OUT"/*/sets/"${row%%:*}.pt" 2> /dev/null) ]] ||
    refuse "SETS: '$row' is unknown"
  [[ $RECIPE-$row != paper-best_* && $RECIPE-$row != best-mkdt_* ]] || refuse "SETS: '$row' is not of RECIPE=$RECIPE"
done
judged=() # DOWNSTREAM, its words
while read -r name; do
  case $name in
    imagefolder:*) [ -d "${name#*:}" ] || [ -n "${DRY_RUN:-}" ] || refuse "DOWNSTREAM: '$name': there is no such folder" ;;
    images) refuse "DOWNSTREAM: images have no labels" ;;
    *) grep -qF "    \"$name\": Dataset(" common.py || refuse "DOWNSTREAM: '$name' is no data set with labels" ;;
  esac
  judged+=("$name")
done < <([ -z "${DOWNSTREAM:-}" ] || xargs -n 1 printf '%s\n' <<< "$DOWNSTREAM" 2>&1)
only="fraction|init|seed|name|method|dataset|data_dir|out_dir|image_size|limit|width|depth" # all rows or none
[[ ! " ${DISTILL:-} ${KRR_ST:-} " =~ [[:space:]]--($only)[[:space:]=] ]] ||
  refuse "DISTILL and KRR_ST: --${BASH_REMATCH[1]} would make some rows unlike others; use FRACTION, SETS, STUDENT ..."
[ -n "${DRY_RUN:-}" ] || command -v "${PYTHON:-python}" > /dev/null || refuse "PYTHON=${PYTHON:-python}: not found"
[ "$preset" != images ] || [ -n "${DOWNSTREAM:-}" ] || [ "$table" = figure1 ] ||
  refuse "images have no labels: name the labelled sets that judge, DOWNSTREAM='imagefolder:DIR2 cifar10'"

# ---- a table: its data sets, rows and protocols ----------------------------------------------------------------
presets=cifar100 default_ssl=barlow_twins default_fraction=0.02 labels="0.01 0.05" protocols=linear
rows="none subset_random subset_sas subset_high_loss mkdt_random mkdt_high_loss full"
rows+=" subset_random_auto subset_high_loss_auto"
every="$rows krr_st_random subset_random:SSL subset_random:krr_st krr_st_random:krr_st mkdt_random:krr_st"
three="cifar10 cifar100 tinyimagenet" resnets="resnet10 resnet18"
case $table in
  '') presets=digits ;;
  table1) presets=cifar10 rows=$every ;;
  table2) rows=$every ;;
  table3) presets=tinyimagenet rows=$every ;;
  table4) presets=$three default_fraction=0.05 rows="none subset_random mkdt_high_loss full" ;;
  table5) default_fraction=0.05 labels=0.05 protocols=$resnets rows="none subset_random mkdt_high_loss_1000" ;;
  table6) presets="cifar10 cifar100" default_ssl=simclr rows="none subset_random subset_random:SSL mkdt_high_loss" ;;
  table7) presets=$three labels="0.1 0.5" rows="none subset_random subset_sas krr_st_random mkdt_high_loss full" ;;
  appendix_b) protocols="finetune_krr_st finetune finetune_slow"
    rows="none subset_random subset_random:SSL krr_st_random krr_st_random:krr_st mkdt_high_loss" ;;
esac
[ "$RECIPE" = paper ] || rows=${rows//mkdt_/best_}
[ "$RECIPE" = paper ] || [[ $rows = *subset_random_auto* ]] || rows+=" subset_random_auto"

# ---- a preset: the scripts' defaults are the paper's for 2 % of CIFAR-10; of repeated options the last one counts ----
options() {
  local dataset=$1 threads="" seeds="0 1 2"
  teacher="" student="" experts="" distil="" rates="" krr_st="" evaluate="" sets=$rows
  ssl=${SSL:-$default_ssl} fraction=${FRACTION:-$default_fraction}
  case $1 in
    digits) # chosen on held-out training images (evaluate.py --split val); small tensors are fastest on one thread
      ssl=${SSL:-simclr} seeds="0 1 2 3 4 5 6 7 8 9" labels=${labels/0.01 0.05/0.02 0.1}
      case $default_fraction in 0.05) fraction=0.125 ;; *) fraction=0.05 ;; esac
      threads="--threads 1" student="--width 16" evaluate="--batch_size 32" fraction=${FRACTION:-$fraction}
      teacher="--width 16 --epochs 40 --batch_size 128 --lr 0.003 --min_crop 0.4"
      experts="--num_experts 10 --epochs 5 --batch_size 32"
      distil="--iters 150 --syn_steps 20 --expert_epochs 2 --max_start_epoch 4 --batch_syn 32"
      rates="--lr_img 200 --lr_lr 2e-3" krr_st="--iters 1000 --lr_img 0.01 --batch_real 256"
      [ -n "$table" ] || sets+=" krr_st_random" ;;
    imagefolder) dataset=$1:$folder ;;
    images) dataset=$1:$folder sets=${sets/subset_sas /} ;; # SAS wants to know how many classes
    tinyimagenet)
      teacher="--bt_lambda 0.0009765625" distil="--syn_steps 10" rates="--lr_img 1e5" krr_st="--lr_img 1e-5" ;;
    cifar*) case $fraction in 0.0[5-9]* | 0.[1-9]*) # the paper's options for 5 %
      experts="--epochs 6" distil="--max_start_epoch 5" rates="--lr_img 1e4" ;; esac ;;
  esac
  if [ "$RECIPE" = best ]; then # ours: see results/README.md
    distil="--iters 400 --syn_steps 20 --batch_syn 128 $distil" evaluate+=" --mirror"
    rates="--inner_momentum 0.9 --log_lr --lr_init auto --lr_lr 0.05 --lr_img 1e4 --clip_grad 0.003 --decay 0.1"
  fi
  if [ -n "$rehearse" ]; then
    seeds="0 1" labels="0.1 0.5" student+=" --limit 500 --width 16" rates+=" --iters 3"
    experts+=" --num_experts 2 --batch_size 32"
    teacher+=" --limit 500 --width 8 --epochs 1 --batch_size 32" distil+=" --syn_steps 3"
    krr_st+=" --iters 3 --pool_steps 9 --batch_real 32" evaluate+=" --epochs 2 --krr_st_epochs 4 --finetune_steps 3"
  fi
  sets=${SETS:-$sets} sets=${sets//:SSL/:$ssl} student+=" ${STUDENT:-}" teacher="--ssl $ssl $teacher ${TEACHER:-}"
  base=$OUT/$(basename "${dataset#*:}") # the teacher's folder; it serves all sizes of sets and both recipes
  case $1-$ssl in digits-simclr | [!d]*-barlow_twins) ;; *) base+=_$ssl ;; esac
  base+=$rehearse out=$base
  case $1-$fraction in digits-0.05 | [!d]*-0.02) ;; *) out+=_$fraction ;; esac
  [ "$RECIPE" = paper ] || out+=_best
  data=(--dataset "$dataset" --data_dir "${DATA_DIR:-data}" $threads ${IMAGE_SIZE:+--image_size $IMAGE_SIZE})
  judges=("$dataset") # the data sets of the probe
  case $1$rehearse in cifar10 | cifar100 | tinyimagenet) judges=($three aircraft cub2011 dogs flowers) ;; esac
  [ ${#judged[@]} = 0 ] || judges=("${judged[@]}")
  evaluate+=" --sets $sets --seeds ${SEEDS:-$seeds}"
}

# ---- the stages ------------------------------------------------------------------------------------------------
child=
stopped() { # a signal to this script is the stage's, too, which then writes its checkpoint
  [ -z "$child" ] || { kill -TERM "$child" 2> /dev/null && wait "$child"; } || true
  exit "$1"
}
trap 'stopped 143' TERM
trap 'stopped 130' INT
run() { # a stage; the paper matches one expert an iteration, so distill.py has one process here
  local launch=("${PYTHON:-python}") status=0
  [ "${PROCESSES:-1}" = 1 ] || [ "$1" = distill.py ] ||
    launch+=(-m torch.distributed.run --standalone --nproc_per_node "$PROCESSES")
  echo "+$(printf ' %q' "${launch[@]}" "$@")"
  [ -z "${DRY_RUN:-}" ] || return 0
  "${launch[@]}" "$@" & # not in front: bash would not hear of a signal
  child=$!
  wait $child || status=$?
  child=
  [ $status = 0 ] || failed=$status
  [ $status -lt 128 ] || exit $status # killed
  return $status
}

bring() { # the file $1 of $base into the folder $2, whole or not at all
  mkdir -p "$2" && { cmp -s "$base/$1" "$2/$1" ||
    { cp "$base/$1" "$2/$1.tmp" && mv "$2/$1.tmp" "$2/$1"; }; } || { failed=2; return 2; }
}

teach() { # targets.pt in $out, of the teacher in $base, or of another --encoder
  local ours=(train_teacher.py "${data[@]}" --out_dir "$out" --target_dim 256) # targets of one's own stay as they are
  if [ "$RECIPE" = best ] && [[ " $teacher" = *" --encoder "* ]]; then
    run "${ours[@]}" $teacher
    return
  fi
  run train_teacher.py "${data[@]}" --out_dir "$base" $teacher || return
  if [ "$RECIPE" = best ] && [ -f "$base/teacher.pt" -o -n "${DRY_RUN:-}" ]; then
    [ -n "${DRY_RUN:-}" ] || bring teacher.pt "$out" || return
    run "${ours[@]}" $teacher --target_dim 256 || return
  elif [ "$out" != "$base" ] && [ -z "${DRY_RUN:-}" ]; then
    bring targets.pt "$out" || return
  fi
}

make_set() { # $1: its row, $2: its seed
  local row=$1 name=$1 seed=$((10#$2)) init words
  [[ $row =~ $known ]] || return 0
  init=${row#*_} init=${init#st_} init=${init%_auto} init=${init%_[0-9]*}
  [ "$row" != subset_high_loss ] || seed=0 # that depends on none
  [ $seed = 0 ] || name+=_seed$seed
  case $row in
    none | full) return ;;
    subset_*_auto) words="$distil $rates ${DISTILL:-} --iters 0 --lr_init auto" ;;
    subset_*) words="$distil ${DISTILL:-} --iters 0" ;;
    krr_st_*) words="--method krr_st $krr_st ${KRR_ST:-}" ;;
    *_[0-9]*) words="$distil $rates ${DISTILL:-} --iters ${row##*_} ${rehearse:+--iters 3}" ;;
    *) words="$distil $rates ${DISTILL:-}" ;;
  esac
  # One that fails is "not run" in the table; but no table is made of a set that was made with other options.
  run distill.py "${data[@]}" --out_dir "$out" $student --fraction "$fraction" --init "$init" \
    --seed $seed --name "$name" $words || [ ! -e "$out/sets/$name.pt" ] || exit 2
}

figure1() { # appendix A.2: five experts with one start for each objective, and a set that matches the first of them
  local curve dir words steps runs=() epochs=20 batch=256 ssl_batch=1024 size=0.01 iters=100
  case $preset in
    digits) batch=32 ssl_batch=128 size=0.05 ;;
    imagefolder | images) batch=64 ssl_batch=256 epochs=10 ;;
  esac
  [ -z "$rehearse" ] || epochs=4 ssl_batch=100 iters=3
  for curve in kd supervised $ssl ${ssl}_4x_batch; do
    dir=$out/figure1/$curve words="--batch_size $ssl_batch" steps="--syn_steps 10"
    case $curve in # alpha_syn starts where 100 iterations brought most; Barlow Twins' would run away
      kd) words="--batch_size $batch" steps="--syn_steps 20 --lr_init 1"
        [ -n "${DRY_RUN:-}" ] || bring targets.pt "$dir" || continue ;;
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

judge() { # the tables of this preset; of a table of the paper, all together in $result
  local protocol name words
  for protocol in $protocols; do
    name=${table:-results} words="--fractions $labels"
    [ $protocol = linear ] || name+=_$protocol
    case $protocol in
      resnet*) words+=" --arch $protocol" ;;
      finetune*) words="--protocol $protocol" ;;
    esac
    [[ $table != table* ]] || words+=" --paper $table"
    run evaluate.py "${data[@]}" --out_dir "$out" --name $name $student $evaluate $words ${EVALUATE:-} \
      --downstream "${judges[@]}" || true
    [ -z "$table" ] || [ ! -f "$out/$name.md" ] ||
      { echo "## $(basename "$out"): $name"; echo; cat "$out/$name.md"; echo; } >> "$result.$$.tmp"
  done
}

suffix=${folder:+_$(basename "$folder")} suffix=${suffix:-${preset:+_$preset}}
result=$OUT/$table$suffix$([ "$RECIPE" = paper ] || echo _best)$rehearse.md
rm -f -- "$result.$$.tmp"
for preset in ${preset:-$presets}; do
  options $preset
  teach || continue
  if [ "$table" = figure1 ]; then figure1; continue; fi
  run train_experts.py "${data[@]}" --out_dir "$out" $student $experts ${EXPERTS:-} || continue
  for row in $(printf '%s\n' $sets | sed 's/:.*//' | awk '!seen[$0]++'); do # each set once
    for seed in $DISTILL_SEEDS; do make_set "$row" "$seed"; done
  done
  judge
done
[ ! -f "$result.$$.tmp" ] || { mv "$result.$$.tmp" "$result" && echo "wrote $result"; }
exit $failed
