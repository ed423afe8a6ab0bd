import json,sys
for l in open(f'/tmp/cv2/{sys.argv[1]}/metrics.jsonl'):
    r=json.loads(l); print({k:r.get(k) for k in('step','loss','seconds','cpu_seconds','tokens','grad_norm')})
