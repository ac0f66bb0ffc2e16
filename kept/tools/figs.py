exec(open('/tmp/editlib.py').read())
import matplotlib; matplotlib.use("Agg")
nb=load('07')
g={}
def run(i):
    t=src(nb,i)
    exec(compile(t,f"cell{i}","exec"),g)
run(4)
p=g["plots"]
class P:
    def __getattr__(s,n): return getattr(p,n)
    def show(s,figure,caption,alt):
        global k
        k+=1; figure.savefig(f"/tmp/shots/fig07_{k}.png",dpi=80,bbox_inches="tight"); print("CAPTION",caption); print("ALT",alt)
k=0
g["plots"]=P(); g["display"]=lambda x:print(x.to_string() if hasattr(x,"to_string") else x)
for i in (25,27,32,36,48): run(i)
g["smoothing"]=None
for i in (53,54,56,58,60): print("---",i); run(i)
