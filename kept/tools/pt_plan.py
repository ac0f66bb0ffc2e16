"""Runs of patience that fit before a deadline, the longest first: python pt_plan.py HH:MM"""
import sys, time, datetime, json, glob
from kd_helpers import artifacts
from kd_helpers.experiments import patience
from kd_helpers.experiments.study import run_arm, _provenance, _folder
h,m=map(int,sys.argv[1].split(':'))
deadline=datetime.datetime.now().replace(hour=h,minute=m,second=0).timestamp()
F=float(sys.argv[2]) if len(sys.argv)>2 else 1.0
RATE={"best_epoch":.86*F,"tuned_teacher":.86*F,"transfer_set":.80*F}   # seconds a step
studies=[(patience.texts_study(),1000)]+[(patience.length_study(s),s) for s in (125,250,500,2000,4000)]
plan=[(steps*RATE.get(arm,.80*F)+20,study,arm,seed) for study,steps in studies for seed in study.seeds for arm in study.arms]
plan.sort(key=lambda x:(x[0]>1500*0.86*F*1.5+20 and x[0]>2000*0.9*F+40,-x[0],x[3]))  # 4,000 last
skip=set()
while True:
    left=deadline-time.time()
    todo=[p for p in plan if id(p) not in skip and p[0]<=left and not (_folder(_provenance(p[1],p[2],p[3]))/'measures.json').exists()]
    if not todo: break
    p=todo[0]; t=time.time()
    try:
        run_arm(p[1],p[2],p[3],wait=False); print(datetime.datetime.now().strftime('%H:%M'),p[2],p[3],round(p[0]),round(time.time()-t),flush=True)
    except artifacts.BeingMadeError:
        skip.add(id(p))
print('no run fits any more',datetime.datetime.now().strftime('%H:%M'))
