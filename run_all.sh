#!/usr/bin/env bash
# Teacher, experts, sets and evaluation in one go: for one data set, or for a table of the paper.
#
#   bash run_all.sh                       digits: no download, a few minutes on two CPU cores
#   bash run_all.sh cifar10               the paper's setting; also: cifar100, tinyimagenet
#   bash run_all.sh imagefolder DIR       your images in DIR/{train,test}/CLASS/*
#   bash run_all.sh table1                a table of the paper, table1 ... table7, or appendix_b, beside its figures
#   bash run_all.sh table1 PRESET         the rows of that table on digits, or on imagefolder DIR
#   bash run_all.sh figure1               the paper's figure 1, on cifar100; also on digits, or on imagefolder DIR
#                                         (4,000 of its images at 16 px): ten minutes on two CPU cores
#   ... rehearse                          at the end of any of them: shrunk to a minute or two (a table: on digits)
#
# Variables, with their defaults:
#   FRACTION=0.02       size of the set (digits 0.05; figure1 0.01); from 0.05 on, cifar10 and cifar100 take the paper's 5 % options
#   SSL=barlow_twins    or simclr (the default of digits)
#   RECIPE=best         ours instead of the paper's (train_teacher.py --centre, distill.py --recipe best): a folder of its
#                       own, runs/PRESET_best, and rows best_INIT
#   SETS="..."          rows: none, full, subset_INIT, subset_INIT_lr_from_SET, mkdt_INIT, mkdt_INIT_ITERS, best_INIT, krr_st_INIT,
#                       with INIT one of random, high_loss, sas; and :krr_st, :simclr or :barlow_twins behind a
#                       row for another way to pre-train on its set
#   DISTILL_SEEDS="0"   of the sets: one set of each method and seed
#   SEEDS="0 1 2"       of the evaluation (digits: ten)
#   DOWNSTREAM="..."    data sets of the probe: the paper's seven; digits and imagefolder: themselves
#   IMAGE_SIZE=32       of an imagefolder
#   TEACHER EXPERTS DISTILL KRR_ST EVALUATE    further options of a stage, for example TEACHER="--batch_size 64", or
#                       "--restart", to begin anew what was begun with other options
#   STUDENT             those of all stages but the teacher, for example STUDENT="--width 64"
#   PROCESSES=1         of each stage, by torchrun: one a GPU; distill.py has one, as the paper averages no
#                       experts, unless DISTILL="--segments 4" says otherwise
#   DATA_DIR=data  OUT=runs/PRESET (tables: runs)  PYTHON=python
#   DRY_RUN=1           print the commands only
# What is finished is not done again, and what was under way goes on from its checkpoint: after an interruption,
# give the same command once more.
set -efo pipefail # f: a * in a variable is no file name

usage() { echo "error: $1" >&2; exit 2; }

case $1 in
  -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit ;;
  table[1-7] | appendix_b | figure1) table=$1; shift ;;
  table* | figure*) usage "table '$1' is unknown: choose table1 ... table7, appendix_b, or figure1" ;;
esac
preset= folder= rehearse= best=
[ "$RECIPE" != best ] || best=_best # of names
case $1 in
  digits | cifar10 | cifar100 | tinyimagenet) preset=$1; shift ;;
  imagefolder)
    [ -n "$2" ] || usage "imagefolder needs a folder: bash run_all.sh imagefolder DIR"
    preset=imagefolder folder=${2%/}; shift 2 ;;
  rehearse | '') ;;
  *) usage "preset '$1' is unknown: choose digits, cifar10, cifar100, tinyimagenet, or imagefolder DIR" ;;
esac
[ $# -eq 0 ] || [ "$*" = rehearse ] || usage "'$*' is not understood: at the end comes nothing, or the word rehearse"
rehearse=$1
for variable in SEEDS DISTILL_SEEDS; do
  for seed in ${!variable}; do
    [[ $seed =~ ^[0-9]{1,9}$ ]] || usage "$variable='${!variable}' is not understood: give whole numbers"
  done
done
init='(random|high_loss|sas)'
row="none|(full|subset_$init(_lr_from_[a-z0-9_]+)?|krr_st_$init|(mkdt|best)_$init(_[0-9]+)?)"
row+="(:(kd|krr_st|simclr|barlow_twins))?"
for set in $SETS; do
  [[ $set =~ ^($row)$ ]] || usage "SETS: '$set' is unknown: bash run_all.sh --help names those that there are"
done
for name in $DOWNSTREAM; do
  [[ $name =~ ^(digits|cifar10|cifar100|tinyimagenet|aircraft|cub2011|dogs|flowers|imagefolder(:.+)?)$ ]] ||
    usage "DOWNSTREAM: '$name' is unknown: choose the data sets that python evaluate.py --help names"
done
[[ ${PROCESSES:-1} =~ ^[1-9][0-9]{0,3}$ ]] || usage "PROCESSES=$PROCESSES is not understood: give a whole number"
[[ $RECIPE =~ ^(paper|best)?$ ]] || usage "RECIPE=$RECIPE is not understood: choose paper or best"
[[ $SSL =~ ^(barlow_twins|simclr)?$ ]] || usage "SSL=$SSL is not understood: choose barlow_twins or simclr"
if [ "$FRACTION" ]; then
  number=$(awk -v x="$FRACTION" 'BEGIN { if (x ~ /^[0-9]*[.]?[0-9]+$/ && x > 0 && x <= 1) printf "%g", x }')
  FRACTION=${number:-$(usage "FRACTION=$FRACTION is not understood: give a number above 0, at most 1")}
fi
[ -f train_teacher.py ] || usage "there is no train_teacher.py here: start run_all.sh in its own folder"
if [ -z "$DRY_RUN" ]; then
  command -v "${PYTHON:-python}" > /dev/null || usage "PYTHON=${PYTHON:-python}: there is no such command"
  mkdir -p "${OUT:-runs}" 2> /dev/null || usage "OUT=${OUT:-runs}: is not a folder, and none can be made there"
fi

# The rows and the protocols of each table: of the data set itself without one.
presets=cifar100 size= ssl= fractions= protocols=linear
rows="none subset_random subset_sas subset_high_loss mkdt_random mkdt_high_loss full"
rows+=" subset_random_lr_from_mkdt_random subset_high_loss_lr_from_mkdt_high_loss"
every="$rows krr_st_random subset_random:SSL subset_random:krr_st krr_st_random:krr_st mkdt_random:krr_st"
case $table in
  '') presets=digits ;;
  table1) presets=cifar10 rows=$every ;;
  table2) rows=$every ;;
  table3) presets=tinyimagenet rows=$every ;;
  table4) presets="cifar10 cifar100 tinyimagenet" size=large rows="none subset_random mkdt_high_loss full" ;;
  table5)
    size=large fractions=0.05 rows="none subset_random mkdt_high_loss_1000"
    protocols="resnet10_batch resnet18_batch resnet10_instance resnet18_instance" ;;
  table6) presets="cifar10 cifar100" ssl=simclr rows="none subset_random subset_random:SSL mkdt_high_loss" ;;
  table7)
    presets="cifar10 cifar100 tinyimagenet" fractions="0.1 0.5"
    rows="none subset_random subset_sas krr_st_random mkdt_high_loss full" ;;
  appendix_b)
    rows="none subset_random subset_random:SSL krr_st_random krr_st_random:krr_st mkdt_high_loss"
    protocols="finetune_krr_st finetune finetune_slow" ;;
esac
[ -z "$rehearse" ] || presets=digits # no network for a rehearsal
preset_given=$preset presets=${preset:-$presets}

run() {
  local launch=("${PYTHON:-python}")
  local words=(python)
  if [ "${PROCESSES:-1}" != 1 ] && [[ $1 != distill.py || $DISTILL = *--segments* ]]; then
    words=(torchrun --standalone --nproc_per_node "$PROCESSES")
    launch+=(-m torch.distributed.run "${words[@]:1}")
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # as torchrun has it, without a word
  fi
  echo "+ ${words[*]}$(printf ' %q' "$@")"
  [ -z "$DRY_RUN" ] || return 0
  "${launch[@]}" "$@" & # not in front, for bash hears of no signal then
  child=$!
  wait $child
}

stop() { # a signal to this script alone is the stage's, too, which then writes its checkpoint
  [ -z "$child" ] || { kill -TERM "$child" 2> /dev/null && wait "$child"; } || true
  exit "$1"
}
child=
trap 'stop 130' INT
trap 'stop 143' TERM

failed=0
attempt() { # run, and go on if it fails, unless it was killed
  local status=0
  run "$@" || status=$?
  [ $status -lt 128 ] || exit $status
  [ $status -eq 0 ] || failed=$status
  return $status
}

# Figure 1 (appendix A.2): experts with one start, and a set that matches the first of them, for each objective.
# It goes on where pipeline has made the teacher, with its variables.
figure1() {
  local epochs=20 iters=100 batch=() ssl_batch=1024 set_fraction=${FRACTION:-0.01} runs=()
  local curve dir words steps name alpha=()
  [ "$ssl" = simclr ] || alpha=(--lr_init 1e-4 --lr_lr 0) # Barlow Twins' loss is so large that alpha_syn runs away
  case $preset in
    digits) batch=(--batch_size 32) ssl_batch=128 set_fraction=${FRACTION:-0.05} ;;
    imagefolder) batch=(--batch_size 64) ssl_batch=256 epochs=10 ;;
  esac
  [ -z "$rehearse" ] || epochs=4 iters=3 ssl_batch=100
  for curve in kd supervised "$ssl" "${ssl}_4x_batch"; do
    dir=$out/figure1/$curve
    words=(--objective "${curve%_4x_batch}" --same_init --num_experts 5 --epochs $epochs)
    case $curve in # N and M as in appendix A.2, KD's are ours; alpha_syn starts where 100 iterations brought most
      kd)
        words+=("${batch[@]}") steps=(--syn_steps 20 --expert_epochs 2 --lr_init 1)
        [ "$DRY_RUN" ] || cmp -s "$out/targets.pt" "$dir/targets.pt" ||
          { mkdir -p "$dir" && cp "$out/targets.pt" "$dir"; } ;;
      supervised) words+=("${batch[@]}") steps=(--syn_steps 20 --expert_epochs 4 --lr_init 0.01) ;;
      *_4x_batch) words+=(--batch_size $((4 * ssl_batch))) steps=(--syn_steps 10 --expert_epochs 2 "${alpha[@]}") ;;
      *) words+=(--batch_size $ssl_batch) steps=(--syn_steps 10 --expert_epochs 2 "${alpha[@]}") ;;
    esac
    attempt train_experts.py "${data[@]}" --out_dir "$dir" "${student[@]}" "${words[@]}" $EXPERTS || continue
    words=(--out_dir "$dir" --fraction "$set_fraction" --init random --max_experts 1 --max_start_epoch 1)
    words+=(--iters $iters --lr_img 1000)
    attempt distill.py "${data[@]}" "${student[@]}" "${words[@]}" "${steps[@]}" $DISTILL || continue
    runs+=("$dir")
  done
  name=figure1${preset_given:+_$(basename "${folder:-$preset}" | tr -c 'A-Za-z0-9_.+\n-' _)}${best}${rehearse:+_rehearsal}
  [ ${#runs[@]} -eq 0 ] || attempt evaluate.py --out_dir "${OUT:-runs}" --name "$name" --figure1 "${runs[@]}"
}

# One data set, from the teacher to its table. The scripts' defaults are the paper's setting for 2 % of CIFAR-10;
# options may be given twice: the last one counts.
pipeline() {
  local preset=$1 dataset=$1 threads=() student=() teacher=() experts=() distill=() rates=() krr_st=() evaluate=()
  local default_ssl=barlow_twins default_fraction=0.02 large=0.05 seeds="0 1 2" labels="0.01 0.05"
  local sets=${SETS:-$rows}
  case $preset in
    digits) # chosen on held-out training images (evaluate.py --split val)
      default_ssl=simclr default_fraction=0.05 large=0.125 seeds="0 1 2 3 4 5 6 7 8 9" labels="0.02 0.1"
      threads=(--threads 1) # small tensors are fastest so
      student=(--width 16)
      teacher=(--width 16 --epochs 40 --batch_size 128 --lr 0.003 --min_crop 0.4)
      experts=(--num_experts 10 --epochs 5 --batch_size 32)
      distill=(--iters 150 --syn_steps 20 --expert_epochs 2 --max_start_epoch 4 --batch_syn 32)
      rates=(--lr_img 200 --lr_lr 2e-3)
      krr_st=(--iters 1000 --lr_img 0.01 --batch_real 256)
      evaluate=(--batch_size 32)
      [ "$table" ] || sets=${SETS:-$rows krr_st_random} ;;
    imagefolder)
      dataset=imagefolder:$folder
      if [ "$table" = figure1 ]; then
        default_ssl=simclr student=(--limit 4000 --width 32) IMAGE_SIZE=${IMAGE_SIZE:-16}
        teacher=(--limit 4000 --width 16 --epochs 10 --batch_size 128 --lr 0.003 --min_crop 0.2)
      fi ;;
  esac
  local fraction=${FRACTION:-${size:+$large}} ssl=${SSL:-${ssl:-$default_ssl}}
  fraction=${fraction:-$default_fraction} labels=${fractions:-$labels}
  local downstream=("$dataset") words
  case $preset in
    tinyimagenet)
      teacher=(--bt_lambda 0.0009765625) distill=(--syn_steps 10) rates=(--lr_img 1e5) krr_st=(--lr_img 1e-5) ;;
    cifar10 | cifar100)
      if awk "BEGIN { exit !($fraction >= 0.05) }"; then
        experts=(--epochs 6) distill=(--max_start_epoch 5) rates=(--lr_img 1e4)
      fi ;;
  esac
  case $preset in
    cifar* | tinyimagenet)
      [ "$rehearse" ] || downstream=(cifar10 cifar100 tinyimagenet aircraft cub2011 dogs flowers) ;;
  esac
  if [ "$RECIPE" = best ]; then # which brings its own rates
    teacher+=(--centre)
    [ "$SETS" ] || sets=${sets//mkdt_/best_}
  fi
  local iters=() # of mkdt_INIT; mkdt_INIT_ITERS has its own
  if [ "$rehearse" ]; then
    seeds="0 1" labels="0.1 0.5" iters=(--iters 3)
    student+=(--limit 500 --width 16)
    teacher+=(--limit 500 --width 8 --epochs 1 --batch_size 32)
    experts+=(--num_experts 2)
    distill+=(--syn_steps 3)
    krr_st+=(--iters 3 --pool_steps 9 --batch_real 32)
    evaluate+=(--epochs 2 --krr_st_epochs 4 --finetune_steps 3)
  fi
  [ -z "$DOWNSTREAM" ] || downstream=($DOWNSTREAM)
  seeds=(${SEEDS:-$seeds}) sets=(${sets//:SSL/:$ssl}) student+=($STUDENT)

  local suffix= name plain shared
  name=$(basename "${dataset#*:}")
  [ "$ssl" = $default_ssl ] || name+=_$ssl
  plain=${OUT:-runs}/$name${rehearse:+_rehearsal}
  name+=$best
  [ "$table $preset" != "figure1 imagefolder" ] || name+=_figure1
  [ "$fraction" = $default_fraction ] || suffix=_$fraction
  local usual=${OUT:-runs}/$name${rehearse:+_rehearsal} out=${OUT:-runs}/$name$suffix${rehearse:+_rehearsal}
  [ -z "$OUT" ] || [ "$table" ] || out=$OUT usual= plain=
  local data=(--dataset "$dataset" --data_dir "${DATA_DIR:-data}" --out_dir "$out" "${threads[@]}")
  [ -z "$IMAGE_SIZE" ] || data+=(--image_size "$IMAGE_SIZE")

  shared=() # sets of all sizes have one teacher, and targets that are centred and not, too
  [ ! "$suffix" ] || [ ! -f "$usual/targets.pt" ] || shared=("$usual/targets.pt")
  [ "$RECIPE" != best ] || [ "$shared" ] || usual=$plain
  [ ! -f "$usual/teacher.pt" ] || shared+=("$usual/teacher.pt")
  if [ "$shared" ] && [ ! -e "$out" ] && [ -z "$DRY_RUN" ]; then
    rm -rf "$out.tmp" && mkdir -p "$out.tmp"
    cp "${shared[@]}" "$out.tmp" && mv "$out.tmp" "$out"
  fi
  attempt train_teacher.py "${data[@]}" --ssl "$ssl" "${teacher[@]}" $TEACHER || return
  [ "$table" != figure1 ] || { figure1 || true; return; }
  attempt train_experts.py "${data[@]}" "${student[@]}" "${experts[@]}" $EXPERTS || return

  # The sets. One that fails is "not run" in the table; one that is there with other options stops the run.
  local set init seed s ordered=() made=" "
  for set in "${sets[@]}"; do [[ $set = *_lr_from_* ]] || ordered+=("${set%%:*}"); done
  for set in "${sets[@]}"; do [[ $set != *_lr_from_* ]] || ordered+=("${set%%:*}"); done
  for set in "${ordered[@]}"; do
    for s in ${DISTILL_SEEDS:-0}; do
      seed=$((10#$s))
      [ "$set" != subset_high_loss ] || seed=0 # does not depend on it
      init=${set#subset_} init=${init#mkdt_} init=${init#best_} init=${init#krr_st_} init=${init%%_lr_from*} init=${init%_[0-9]*}
      name=$set words=("${data[@]}" "${student[@]}" --fraction "$fraction" --init "$init")
      [ "$seed" = 0 ] || { name+=_seed$seed && words+=(--seed "$seed"); }
      case $set in
        none | full) continue ;;
        subset_*_lr_from_*) words+=("${distill[@]}" $DISTILL --iters 0 --lr_from "${name#*_lr_from_}") ;;
        subset_*) words+=("${distill[@]}" $DISTILL --iters 0) ;;
        mkdt_* | best_*)
          [[ $set = mkdt_* ]] && words+=("${rates[@]}") || words+=(--recipe best)
          words+=("${distill[@]}")
          [[ ! $set =~ _[0-9]+$ ]] || words+=(--iters "${set##*_}" --name "$name")
          words+=("${iters[@]}" $DISTILL) ;;
        krr_st_*) words+=(--method krr_st "${krr_st[@]}" $KRR_ST) ;;
      esac
      [[ $made = *" $name "* ]] || attempt distill.py "${words[@]}" || [ ! -e "$out/sets/$name.pt" ] || exit 2
      made+="$name "
    done
  done

  for protocol in $protocols; do
    name=${table:-results} words=("${data[@]}" "${student[@]}" "${evaluate[@]}")
    case $protocol in
      resnet*) name+=_$protocol words+=(--arch "${protocol%_*}" --norm "${protocol#*_}") ;;
      finetune*) name+=_$protocol words+=(--protocol "$protocol") ;;
    esac
    [[ $protocol = finetune* ]] || words+=(--fractions $labels)
    [[ $table != table* ]] || words+=(--paper "$table")
    touch "$marker"
    attempt evaluate.py "${words[@]}" $EVALUATE --name "$name" --sets "${sets[@]}" \
      --downstream "${downstream[@]}" --seeds "${seeds[@]}" || true
    echo "## $(basename "$out"): $name"$'\n' >> "$parts"
    if [ "$out/$name.md" -nt "$marker" ]; then
      made_any=1
    elif [ -f "$out/$name.md" ]; then
      echo "Not made this time; from an earlier run:"$'\n' >> "$parts"
    else
      echo "not run" >> "$parts"
    fi
    [ ! -f "$out/$name.md" ] || cat "$out/$name.md" >> "$parts"
    echo >> "$parts"
  done
}

marker=$(mktemp) parts=$(mktemp) made_any=
trap 'rm -f "$marker" "$parts"' EXIT
for preset in $presets; do
  pipeline "$preset" || printf '## %s\n\nnot run\n\n' "$preset" >> "$parts"
done
if [ "$table" ] && [ "$made_any" ]; then
  of=${folder:+$(basename "$folder")} of=${of:-$preset_given} # of the paper's own sets: none
  result=${OUT:-runs}/$table${of:+_$of}$best${rehearse:+_rehearsal}.md
  cp "$parts" "$result.tmp"
  mv "$result.tmp" "$result"
  echo "wrote $result"
fi
exit $failed
