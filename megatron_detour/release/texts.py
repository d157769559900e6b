"""Built-in texts on which an exported model is compared with transformers.

They are invented: English and French in clinical style, three short ones and two longer than a local layer's window.
"""

from __future__ import annotations

from pathlib import Path

from megatron_detour.errors import DetourError

MAX_TEXTS = 32  # of a user's file, to bound the time

TEXTS = (
    "The patient takes her tablets twice a day.",
    "Elle se plaint d'une toux sèche depuis l'automne dernier ; l'auscultation est normale.",
    "BP 138/82 mmHg, HR 71/min, SpO₂ 97 % on air, temp. 38.4 °C – no œdema; CRP 12 mg/l (↓), INR 2.3.",
    "This 67-year-old man was brought in by his daughter after three days of fever and a productive cough. He has had "
    "type 2 diabetes for eleven years, treated with metformin 850 mg twice daily, and a hip replacement in 2014. He "
    "stopped smoking when his grandson was born. On arrival he was alert but breathless at rest, with a respiratory "
    "rate of 26 per minute and coarse crackles over the right lower zone. There was no calf tenderness and no leg "
    "swelling. The chest film showed an opacity in the right lower lobe without an effusion. White cells were 15.2, "
    "creatinine 98 and lactate 1.4. Blood and sputum were sent for culture before amoxicillin and clarithromycin were "
    "given. Overnight he needed two litres of oxygen through nasal cannulae, which the nurses could stop on the second "
    "morning. His glucose rose to 16 mmol/l while he was febrile, and was brought down with four units of insulin; "
    "metformin was resumed before discharge. The culture of the sputum grew pneumococci, sensitive to penicillin. The "
    "family asked whether he should be vaccinated: we advised it once he had recovered, and wrote to his general "
    "practitioner. He went home on the fifth day, walking with his stick, and will be seen in the clinic in six weeks "
    "with another film. Should the fever return, or should he cough blood, he knows that he can call the ward at any "
    "hour. His daughter has been shown how to keep the diary of his glucose, and will bring it along.",
    "Patiente de 54 ans, institutrice, adressée pour des douleurs épigastriques évoluant depuis deux mois, "
    "sans amaigrissement ni vomissements. Dans ses antécédents, on note une hypothyroïdie substituée par lévothyroxine "
    "75 µg par jour, une appendicectomie dans l'enfance et une allergie à l'aspirine. Elle ne fume pas et boit un "
    "verre de vin le dimanche. À l'examen, l'abdomen est souple, dépressible, à peine sensible au creux de l'estomac ; "
    "les aires ganglionnaires sont libres et il n'y a pas d'ictère. La biologie ne montre ni anémie ni syndrome "
    "inflammatoire, et la lipase est normale. L'échographie retrouve une vésicule à parois fines, sans calcul, et un "
    "foie homogène. La fibroscopie réalisée sous anesthésie locale met en évidence une gastrite antrale modérée ; les "
    "biopsies confirment la présence d'Helicobacter pylori. Un traitement de dix jours associant oméprazole, "
    "clarithromycine et métronidazole est prescrit, après avoir vérifié l'absence d'interaction avec son traitement "
    "habituel. La patiente est prévenue du goût métallique et de la nécessité de s'abstenir d'alcool. Un test "
    "respiratoire de contrôle est prévu six semaines après la fin des antibiotiques, à distance de l'arrêt de "
    "l'oméprazole. Elle est revue ce jour : les douleurs ont disparu, l'appétit est revenu, et l'examen clinique est "
    "sans particularité. Le courrier est adressé à son médecin traitant, qui poursuivra la surveillance de la thyroïde "
    "comme auparavant ; aucun arrêt de travail n'a été nécessaire.",
)


def read_texts(file: str | None) -> tuple[str, ...]:
    """Return the first `MAX_TEXTS` non-empty lines of a file, or TEXTS for None. Raises DetourError."""
    if file is None:
        return TEXTS
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise DetourError(f"--text {file}: not UTF-8 text") from None
    except OSError as error:
        raise DetourError(f"--text {file}: cannot be read: {error.strerror}") from None
    texts = tuple(line.strip() for line in lines if line.strip())[:MAX_TEXTS]
    if not texts:
        raise DetourError(f"--text {file}: empty; write one document per line")
    return texts
