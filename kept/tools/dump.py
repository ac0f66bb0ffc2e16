import json,sys,glob
root=sys.argv[1]
for n in sys.argv[2:]:
    f=glob.glob(f"{root}/notebooks/{n}_*.ipynb")[0]
    nb=json.load(open(f)); out=open(f"/tmp/nb_{n}.txt","w")
    for i,c in enumerate(nb["cells"]):
        tags=c["metadata"].get("tags",[])
        out.write(f"\n===== {i} {c['cell_type']} {tags}\n"+"".join(c["source"])+"\n")
        for o in c.get("outputs",[]):
            t=o.get("text") or o.get("data",{}).get("text/plain")
            if t: out.write("--- out\n"+"".join(t)[:1500]+"\n")
