import sys; sys.path[:0]=['/work/main/tests']
import time
from workers import *
def job(kind, engine, dt):
    import torch, zo_dist
    from models import build, rows_for, loss_of
    t=time.time()
    m=wrap(engine, build(kind, getattr(torch,dt)))
    t1=time.time()-t
    o=zo_dist.ZeroOrder(m, lr=1e-2, eps=1e-2, directions=3)
    t=time.time()
    for _ in range(5): l=o.step_batch(rows_for(kind,4,dtype=getattr(torch,dt)), loss_of)
    return [round(t1,3), round((time.time()-t)/5,4), digest(whole_weights(o)), [a.name for a in o.arms], l]
if __name__=='__main__':
    for n in (1,2,3):
        p=Pool(n); t=time.time(); 
        for e in ENGINES:
            if e.startswith('hsdp') and n!=2: continue
            for k in ('sequential','llama'):
                if e=='zero3_init' and k=='sequential': continue
                o = p._call(job,(k,e,'float32'),60)
                print(n,k,e, [x.value if not x.error else x.trace[-300:] for x in o], round(time.time()-t,1), flush=True)
        p.stop()
