from kd_helpers.experiments import patience
from kd_helpers.experiments.study import _provenance,_folder
st=patience.texts_study()
print(sum(not (_folder(_provenance(st,a,s))/"measures.json").exists() for a in st.arms for s in st.seeds))
