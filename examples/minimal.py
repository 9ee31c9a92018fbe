"""The README's example: from nothing to a steered sentence, on the model and the text that come with miStudio."""

from mistudio_engine import connect
from mistudio_engine.demo.embedded import DEMO_HOOK, DEMO_SAE

studio = connect()  # finds the engine or starts it
studio.get_model(source="embedded", name="tiny").wait()
studio.get_dataset(source="embedded", name="corpus", model="tiny").wait()
sae = studio.train_sae(model="tiny", dataset="corpus", hook_name=DEMO_HOOK, **DEMO_SAE).wait()
print("FVU", round(studio.eval_sae(sae=sae.slug).wait().fvu, 3))
studio.extract(sae=sae.slug, n_tokens=60_000).wait()
studio.label_features(sae=sae.slug).wait()
best = studio.search_features(query="weather", sae=sae.slug, mode="meaning", limit=1).rows[0]
print(best.ref, "|", best.label)
push = {"feature": best.ref, "strength": 0.45, "unit": "norm"}  # 0.45 times the layer's typical norm
steered = studio.steer(interventions=[push], prompt="Last night there was", max_new_tokens=12).wait()
print(steered.baseline[0].text, "→", steered.steered[0].text)
