"""Skin lesions: an image and a question, reasoning, and the name of the disease. Start reading at `recognition.py`."""

from lit_agentrl.envs.dermatology.conversation import ConversationSuite
from lit_agentrl.envs.dermatology.facts import FactJudge, GraphFacts
from lit_agentrl.envs.dermatology.folders import ClassFolders
from lit_agentrl.envs.dermatology.hints import Hint
from lit_agentrl.envs.dermatology.isic import HAM10000, ISIC
from lit_agentrl.envs.dermatology.llava import LlavaImages
from lit_agentrl.envs.dermatology.medmnist import MedMNIST
from lit_agentrl.envs.dermatology.panel import DermatologyPanel
from lit_agentrl.envs.dermatology.parser import AnswerParser
from lit_agentrl.envs.dermatology.recognition import RecognitionSuite
from lit_agentrl.envs.dermatology.samples import ImageSource, Sample, file_image
from lit_agentrl.envs.dermatology.selection import Selection
from lit_agentrl.envs.dermatology.synthetic_lesions import SyntheticLesions
from lit_agentrl.envs.dermatology.synthetic_questions import SyntheticQuestions

__all__ = [
    "HAM10000",
    "ISIC",
    "AnswerParser",
    "ClassFolders",
    "ConversationSuite",
    "DermatologyPanel",
    "FactJudge",
    "GraphFacts",
    "Hint",
    "ImageSource",
    "LlavaImages",
    "MedMNIST",
    "RecognitionSuite",
    "Sample",
    "Selection",
    "SyntheticLesions",
    "SyntheticQuestions",
    "file_image",
]
