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
best = studio.search_features(query="animals", sae=sae.slug, limit=1).rows[0]
print(best.ref, "|", best.label, "|", round(best.activation_frequency, 4))
steered = studio.steer(interventions=[{"feature": best.ref, "strength": 2.0}], prompt="The").wait()
print(steered.baseline[0].text, "→", steered.steered[0].text)
