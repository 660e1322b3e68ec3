import importlib.util

import pytest
import torch

import mipprune

INSTALLED = importlib.util.find_spec("llmcompressor") is not None


@pytest.mark.skipif(INSTALLED, reason="llm-compressor is installed")
def test_without_llm_compressor_the_extra_is_named():
    with pytest.raises(ImportError, match=r"pip install 'mipprune\[llmcompressor\]'"):
        importlib.import_module("mipprune.llmcompressor")


@pytest.mark.skipif(not INSTALLED, reason="needs llm-compressor (make test-extras)")
@pytest.mark.filterwarnings("default")
class TestWithLlmCompressor:
    @pytest.fixture
    def oneshot(self, tmp_path, monkeypatch, embedded):
        """Prune the embedded model, saved to a folder, by a recipe; the pruned model."""
        monkeypatch.chdir(tmp_path)
        embedded.model.save_pretrained("dense")
        embedded.tokenizer.save_pretrained("dense")

        def oneshot(recipe, samples=4):
            from datasets import Dataset
            from llmcompressor import oneshot as run
            from transformers import AutoModelForCausalLM

            tokens = torch.randint(
                3, 2000, (samples, 64), generator=torch.Generator().manual_seed(0)
            )
            data = Dataset.from_dict(
                {"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()}
            )
            model = AutoModelForCausalLM.from_pretrained("dense", dtype=torch.float32)
            run(
                model=model,
                dataset=data,
                recipe=recipe,
                num_calibration_samples=samples,
                max_seq_length=64,
                output_dir="out",
            )
            return model

        return oneshot

    def test_the_swap_search_prunes_by_the_row(self, oneshot, tmp_path):
        from mipprune.llmcompressor import SolverPruningModifier

        modifier = SolverPruningModifier(sparsity=0.6, ignore=["re:.*lm_head"])
        model = oneshot([modifier])
        assert len(modifier.masks) == 42
        for name, mask in modifier.masks.items():
            weight = model.get_submodule(name).weight
            d = weight.shape[1]
            assert bool((mask.sum(dim=1) == d - int(0.6 * d)).all())
            assert not bool(weight[~mask].any())
        start, end = (sum(losses) for losses in zip(*modifier.losses.values(), strict=True))
        assert end < 0.8 * start
        # saved dense, and the masks on the dense model give the saved one
        saved = mipprune.load_model(str(tmp_path / "out"), torch.device("cpu"))
        dense = mipprune.load_model(str(tmp_path / "dense"), torch.device("cpu"))
        mipprune.apply_masks(dense.model, modifier.masks)
        for name in modifier.masks:
            one, other = (m.model.get_submodule(name).weight for m in (saved, dense))
            assert torch.equal(one, other)

    def test_n_of_m_counts_the_removed_there(self, oneshot):
        from llmcompressor.modifiers.factory import ModifierFactory

        from mipprune.llmcompressor import SolverPruningModifier

        made = ModifierFactory.create(
            "SolverPruningModifier",
            allow_registered=True,
            allow_experimental=False,
            sparsity=0.75,
            mask_structure="3:4",
            solver="wanda",
            ignore=["re:.*lm_head"],
        )
        assert isinstance(made, SolverPruningModifier)
        model = oneshot([made], samples=2)
        weight = model.model.layers[3].mlp.up_proj.weight
        assert bool(((weight.reshape(-1, 4) != 0).sum(dim=1) <= 1).all())
        assert all(
            bool((mask.reshape(-1, 4).sum(dim=1) == 1).all()) for mask in made.masks.values()
        )

    def test_unknown_solvers_are_refused_before_the_run(self, oneshot):
        from mipprune.llmcompressor import SolverPruningModifier

        with pytest.raises(ValueError, match="no solver 'magic'"):
            oneshot([SolverPruningModifier(sparsity=0.5, solver="magic")])
