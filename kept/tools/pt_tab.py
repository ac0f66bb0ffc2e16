from kd_helpers.experiments import patience
from kd_helpers.experiments.study import _provenance,_folder
from kd_helpers import artifacts
import collections
t=collections.defaultdict(dict); left=collections.Counter()
for n,st in [("texts",patience.texts_study())]+[(s,patience.length_study(s)) for s in (125,250,500,2000,4000)]:
    for a in st.arms:
        for s in st.seeds:
            f=_folder(_provenance(st,a,s))/"measures.json"
            if f.exists():
                m=artifacts.load_json(f); t[n,a][s]=(round(100*m["accuracy"],1), round(100*m["last_accuracy"],1) if "last_accuracy" in m else None)
            else: left[n]+=1
for k,v in t.items(): print(k,dict(sorted(v.items())))
print("left",dict(left))
