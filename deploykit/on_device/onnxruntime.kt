// The engine on ONNX Runtime. app/build.gradle.kts: implementation("com.microsoft.onnxruntime:onnxruntime-android:VERSION"), a
// release no older than the one that model.json names.
package ondevice

import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtEnvironment
import android.content.Context
import java.nio.FloatBuffer

class Engine(context: Context, private val facts: Facts) : AutoCloseable {
    private val environment = OrtEnvironment.getEnvironment()
    private val session = environment.createSession(engineFile(context, facts).absolutePath)

    fun infer(inputs: Map<String, FloatArray>): Map<String, FloatArray> {
        val tensors = facts.inputs.associate {
            it.name to OnnxTensor.createTensor(environment, FloatBuffer.wrap(inputs.getValue(it.name)), it.shape)
        }
        try {
            session.run(tensors).use { found ->
                return facts.outputs.associate { port ->
                    val buffer = (found.get(port.name).get() as OnnxTensor).floatBuffer
                    port.name to FloatArray(buffer.remaining()).also { buffer.get(it) }
                }
            }
        } finally {
            tensors.values.forEach { it.close() }
        }
    }

    override fun close() = session.close()
}
