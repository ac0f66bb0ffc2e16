export KD_ARTIFACTS=/tmp/art_pt PYTHONPATH=/tmp/pt
while [ "$(OMP_NUM_THREADS=1 /work/main/.venv/bin/python /tmp/texts_left.py 2>/dev/null)" != "0" ]; do sleep 10; done
pkill -f "python /tmp/pt_plan.py"; sleep 1
cd /tmp/sw; export LD_PRELOAD=/tmp/libfi.so KD_ARTIFACTS=/tmp/art_sw PYTHONPATH=/tmp/sw TQDM_MININTERVAL=10 TOKENIZERS_PARALLELISM=false PATH=/work/main/.venv/bin:$PATH
date > /tmp/logs/sweep.start
/work/main/.venv/bin/python -m kd_helpers sweep notebooks/05_distill_and_evaluate.ipynb --out /tmp/art_sw/sweeps/temperature_and_alpha -g temperature=1,2,4,8 -g alpha=0,0.3,0.5,0.7,0.9,1 -g seed=0,1,2 -p epochs 6 --jobs 2 > /tmp/logs/sweep.log 2>&1
OMP_NUM_THREADS=1 /work/main/.venv/bin/python -m kd_helpers course sweep > /tmp/logs/store_sweep.log 2>&1
date >> /tmp/logs/sweep.start
