import json,glob,collections,statistics as st
d=collections.defaultdict(dict)
for f in glob.glob('/tmp/art_w/studies/*/'):
    m=json.load(open(f+'measures.json')); p=json.load(open(f+'provenance.json'))
    d[p['arm']['title']][p['seed']]=m
base=d['Baseline: labels only']
for t,r in d.items():
    both=sorted(set(r)&set(base)); 
    g=[100*(r[s]['accuracy']-base[s]['accuracy']) for s in both]
    ci=''
    if len(g)>1:
        from scipy import stats
        h=stats.t.ppf(.975,len(g)-1)*st.stdev(g)/len(g)**.5; ci=f'±{h:.1f}'
    print(f"{t:50s} n={len(r)} acc {100*st.mean(m['accuracy'] for m in r.values()):.1f} nll {st.mean(m['nll'] for m in r.values()):.3f} ece {st.mean(m['ece'] for m in r.values()):.3f} fid {st.mean(m['fidelity'] for m in r.values()):.3f} gain {st.mean(g):+.2f}{ci} {['%.1f'%x for x in g]}")
